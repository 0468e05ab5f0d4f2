/**
 * Writing LoRAs in the layouts of kohya-ss/sd-scripts, which ComfyUI and the web UIs read, and of diffusers. What
 * another layout keeps apart (queries, keys, values) or turns round (shift and scale) is put in that layout's form.
 */

import { MmditxError } from '../errors.ts';
import {
  SD3_MEDIUM_TRANSFORMER,
  SD35_LARGE_TRANSFORMER,
  SD35_MEDIUM_TRANSFORMER,
  type TransformerConfig,
} from '../models/config.ts';
import { type FloatTensor, floats, type TensorData, toFloat16 } from '../tensor/data.ts';
import type { Lora, LowRank } from './lora.ts';
import {
  ADAPTER_METADATA_KEY,
  diffusersModules,
  diffusersPrefixes,
  kohyaLayer,
  type LoraPart,
  type LoraTarget,
} from './lora-names.ts';
import { quote } from './quote.ts';

/** A change of one whole weight: `alpha / rank * up @ down`. */
export interface LoraLayer {
  readonly part: LoraPart;
  /** The weight, as in `expected.ts`. */
  readonly weight: string;
  /** [rank, inputs]; of a convolution, inputs are channels and places of its kernel together. */
  readonly down: FloatTensor;
  /** [outputs, rank] */
  readonly up: FloatTensor;
  readonly alpha: number;
}

export const LORA_FORMATS = ['kohya', 'diffusers'] as const;
export type LoraFormat = (typeof LORA_FORMATS)[number];

/** Element types that LoRAs are written in. */
export const LORA_DTYPES = ['float16', 'bfloat16', 'float32'] as const;
export type LoraDType = (typeof LORA_DTYPES)[number];

export interface LoraFileOptions {
  readonly format: LoraFormat;
  /** The network that was changed, for the name of the model in the metadata (default: the name is left out). */
  readonly transformer?: TransformerConfig | undefined;
  /** More entries of metadata. Those that describe the tensors of a file (ranks, hashes) are left out or replaced. */
  readonly metadata?: Readonly<Record<string, string>> | undefined;
  /** Default float16. Alphas are float32 always. */
  readonly dtype?: LoraDType | undefined;
}

/** The content of a safetensors file. */
export interface LoraFile {
  readonly tensors: Map<string, TensorData>;
  readonly metadata: Record<string, string>;
}

/**
 * A LoRA as a file.
 *
 * In kohya's layout every layer has its alpha beside it. In diffusers' layout alpha stands in the metadata only, which
 * ComfyUI and older versions of diffusers do not read; so alpha / rank is multiplied into the up matrices there, and
 * alpha is the rank for every reader. The metadata is still needed where ranks differ: without it diffusers takes the
 * first layer's rank as everybody's alpha (`get_peft_kwargs`).
 *
 * @param layers at most one for each weight, of matrices that fit each other
 * @throws MmditxError `bad-option` for a weight that LoRAs of the format cannot change, or values that do not fit into
 *   the element type
 */
export function loraFile(
  layers: readonly LoraLayer[],
  { format, transformer, metadata = {}, dtype = 'float16' }: LoraFileOptions,
): LoraFile {
  requireSound(layers);
  const tensors = new Map<string, TensorData>();
  const kernel = (transformer ?? SD35_MEDIUM_TRANSFORMER).patchSize;
  const add = (name: string, values: FloatTensor) => tensors.set(name, encodeFloats(name, values, dtype));
  const facts = format === 'kohya' ? addKohya(layers, kernel, tensors, add) : addDiffusers(layers, kernel, add);
  return { tensors, metadata: { ...modelFacts(transformer), ...lastingEntries(metadata), ...facts } };
}

type Add = (name: string, values: FloatTensor) => void;

/** @returns the metadata of kohya-ss/sd-scripts (train_network.py) */
function addKohya(
  layers: readonly LoraLayer[],
  kernel: number,
  tensors: Map<string, TensorData>,
  add: Add,
): Record<string, string> {
  for (const layer of layers) {
    const name = kohyaLayer(layer.part, layer.weight);
    if (name === undefined) throw unknownWeight(layer);
    const { down, up } = kernelShaped(layer, kernel);
    add(`${name}.lora_down.weight`, down);
    add(`${name}.lora_up.weight`, up);
    tensors.set(`${name}.alpha`, floats([], [layer.alpha]));
  }
  const common = (values: readonly number[]) => (new Set(values).size === 1 ? String(values[0]) : 'Dynamic');
  return {
    ss_network_module: 'networks.lora_sd3',
    ss_network_dim: common(layers.map(({ down }) => down.shape[0]!)),
    ss_network_alpha: common(layers.map(({ alpha }) => alpha)),
  };
}

/** @returns the metadata of diffusers (`save_lora_weights`) with PEFT's configuration of each network */
function addDiffusers(layers: readonly LoraLayer[], kernel: number, add: Add): Record<string, string> {
  const ranks: { [Part in LoraPart]?: Map<string, number> } = {};
  for (const layer of layers) {
    const modules = diffusersModules(layer.part, layer.weight);
    if (modules.length === 0) throw unknownWeight(layer);
    for (const target of modules) {
      const own = ownRows(layer, target);
      if (!own) continue;
      const { down, up } = kernelShaped({ ...layer, ...own }, kernel);
      const name = `${diffusersPrefixes[layer.part]}.${target.module}`;
      add(`${name}.lora_A.weight`, down);
      add(`${name}.lora_B.weight`, up);
      ranks[layer.part] ??= new Map();
      ranks[layer.part]!.set(target.module, down.shape[0]!);
    }
  }
  const members = Object.entries(ranks).flatMap(([part, own]) => {
    const prefix = diffusersPrefixes[part as LoraPart];
    return Object.entries(adapterConfig(own)).map(([name, value]) => [`${prefix}.${name}`, value]);
  });
  return { format: 'pt', [ADAPTER_METADATA_KEY]: JSON.stringify(Object.fromEntries(members)) };
}

/** What PEFT's `LoraConfig` needs to rebuild the layers, with alpha equal to the rank in each. */
function adapterConfig(ranks: ReadonlyMap<string, number>): Record<string, unknown> {
  const counts = new Map<number, number>();
  for (const rank of ranks.values()) counts.set(rank, (counts.get(rank) ?? 0) + 1);
  const [[common]] = [...counts].sort(([, a], [, b]) => b - a) as [[number, number]];
  const others = Object.fromEntries([...ranks].filter(([, rank]) => rank !== common));
  return {
    r: common,
    lora_alpha: common,
    rank_pattern: others,
    alpha_pattern: others,
    target_modules: [...ranks.keys()],
  };
}

/**
 * A layer's share in a module of diffusers, alpha / rank included, in diffusers' order of rows. Of a third, ranks that
 * change nothing in it are left out, so that three layers that were joined come apart as they were; undefined where
 * the whole third stays as it is while others change.
 */
function ownRows(
  layer: LoraLayer,
  { third, swapped }: Pick<LoraTarget, 'third' | 'swapped'>,
): { down: FloatTensor; up: FloatTensor } | undefined {
  const { down, up, alpha } = layer;
  const [rank, inputs] = down.shape as [number, number];
  const [outputs] = up.shape as [number, number];
  const scaled = up.data.map((value) => (value * alpha) / rank);
  if (third === undefined) {
    if (swapped === 'always' && outputs % 2 !== 0) throw oddShape(layer);
    const turned = swapped === 'always' || (swapped === 'last block' && outputs === 2 * inputs);
    return { down, up: floats(up.shape, turned ? halvesSwapped(scaled) : scaled) };
  }
  if (outputs % THIRDS !== 0) throw oddShape(layer);
  const rows = outputs / THIRDS;
  const own = scaled.subarray(third * rows * rank, (third + 1) * rows * rank);
  const changes = new Uint8Array(rank);
  for (let i = 0; i < own.length; i++) if (own[i] !== 0) changes[i % rank] = 1;
  const used = [...changes.keys()].filter((i) => changes[i]);
  if (used.length === rank || !up.data.some((value) => value !== 0)) return { down, up: floats([rows, rank], own) };
  if (used.length === 0) return undefined;
  const narrowDown = new Float32Array(used.length * inputs);
  const narrowUp = new Float32Array(rows * used.length);
  for (const [to, from] of used.entries()) {
    narrowDown.set(down.data.subarray(from * inputs, (from + 1) * inputs), to * inputs);
    for (let row = 0; row < rows; row++) narrowUp[row * used.length + to] = own[row * rank + from]!;
  }
  return { down: floats([used.length, inputs], narrowDown), up: floats([rows, used.length], narrowUp) };
}

/** Queries, keys and values lie one after the other in one weight. */
const THIRDS = 3;

function halvesSwapped(rows: Float32Array): Float32Array {
  const swapped = new Float32Array(rows.length);
  swapped.set(rows.subarray(rows.length / 2));
  swapped.set(rows.subarray(0, rows.length / 2), rows.length / 2);
  return swapped;
}

/** The one convolution that a LoRA can change: PyTorch's layers want its matrices as convolutions, too. */
const CONVOLUTION = 'x_embedder.proj.weight';

function kernelShaped(layer: LoraLayer, kernel: number): { down: FloatTensor; up: FloatTensor } {
  const { part, weight, down, up } = layer;
  if (part !== 'transformer' || weight !== CONVOLUTION) return { down, up };
  const [rank, inputs] = down.shape as [number, number];
  if (inputs % kernel ** 2 !== 0) throw oddShape(layer);
  return {
    down: floats([rank, inputs / kernel ** 2, kernel, kernel], down.data),
    up: floats([...up.shape, 1, 1], up.data),
  };
}

function unknownWeight({ part, weight }: LoraLayer): MmditxError {
  return new MmditxError(
    'bad-option',
    `No layout of LoRA files has a name for ${quote(weight)} (${part}); leave that weight out.`,
  );
}

function oddShape({ weight, down, up }: LoraLayer): MmditxError {
  return new MmditxError(
    'bad-option',
    `The LoRA changes ${quote(weight)} as ${quote([up.shape[0]!, down.shape[1]!])}, which no Stable Diffusion 3 model has; use one made for it.`,
  );
}

/** That a caller's layers are what their type promises. */
function requireSound(layers: readonly LoraLayer[]): void {
  const seen = new Set<string>();
  for (const { part, weight, down, up, alpha } of layers) {
    const key = `${part} ${weight}`;
    if (seen.has(key)) throw new RangeError(`There are two LoRA layers of ${key}.`);
    seen.add(key);
    if (down.shape.length !== 2 || up.shape.length !== 2 || up.shape[1] !== down.shape[0] || !Number.isFinite(alpha)) {
      throw new RangeError(`The LoRA layer of ${key} has matrices that do not fit each other, or no finite alpha.`);
    }
  }
  if (layers.length === 0) throw new RangeError('A LoRA needs at least one layer.');
}

/** Released models: kohya-ss/sd-scripts' name (`sd3_utils.py`) and the ID of the model specification. */
const releasedModels: readonly (readonly [TransformerConfig, string, string])[] = [
  [SD35_MEDIUM_TRANSFORMER, '3-5-medium', 'stable-diffusion-v3.5-medium'],
  [SD35_LARGE_TRANSFORMER, '3-5-large', 'stable-diffusion-v3.5-large'],
  [SD3_MEDIUM_TRANSFORMER, '3-medium', 'stable-diffusion-v3-medium'],
];

/** Metadata by which tools tell the model; nothing for a model that they do not know. */
function modelFacts(config: TransformerConfig | undefined): Record<string, string> {
  const figures = (of: TransformerConfig) => [of.hiddenSize, of.depth, of.qkNorm, ...of.dualAttentionLayers].join();
  const [, version, architecture] = releasedModels.find(([of]) => config && figures(of) === figures(config)) ?? [];
  if (version === undefined) return {};
  return {
    ss_base_model_version: version,
    'modelspec.sai_model_spec': '1.0.0',
    'modelspec.architecture': `${architecture}/lora`,
  };
}

/** Entries that are true of one file only: its layout, ranks and hashes. */
const FILE_ENTRY = /^(format|lora_adapter_metadata|ss_network_(module|dim|alpha)|sshs_\w+|modelspec\.hash_\w+)$/;

function lastingEntries(metadata: Readonly<Record<string, string>>): Record<string, string> {
  return Object.fromEntries(Object.entries(metadata).filter(([key]) => !FILE_ENTRY.test(key)));
}

/** Values of an encoding that are not finite have all bits of the exponent. */
const exponents = { float16: 0x7c00, bfloat16: 0x7f80 } as const;

/**
 * Finite float32 values in another element type, rounded to the nearest, to even where two are equally near.
 * @param name for the message
 * @throws MmditxError `bad-option` where a value is larger than the type can hold
 */
export function encodeFloats(name: string, { shape, data }: FloatTensor, dtype: LoraDType): TensorData {
  const refuse = () =>
    new MmditxError(
      'bad-option',
      `${quote(name)} gets values that ${dtype} cannot hold; use a lower strength or a wider type.`,
    );
  if (dtype === 'float32') {
    if (!data.every(Number.isFinite)) throw refuse();
    return { dtype, shape, data };
  }
  const bits = dtype === 'float16' ? toFloat16(data) : toBfloat16(data);
  const exponent = exponents[dtype];
  if (bits.some((value) => (value & exponent) === exponent)) throw refuse();
  return { dtype, shape, data: bits };
}

/** Rounds float32 values to bfloat16 (raw bits), to nearest even. */
function toBfloat16(values: Float32Array): Uint16Array {
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length);
  // Carries go on into the exponent, up to infinity. What is not a number must stay so.
  return Uint16Array.from(bits, (value) =>
    (value & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (value + 0x7fff + ((value >>> 16) & 1)) >>> 16,
  );
}

/**
 * The changes of a LoRA that was read, one for each weight. Queries, keys and values that the file keeps apart are
 * joined: with a down matrix they have in common, at their rank; with three, at the sum of their ranks.
 * @throws MmditxError `bad-file` where parts of a weight do not fit each other
 */
export function loraLayers({ name, parts }: Lora): LoraLayer[] {
  return (Object.keys(diffusersPrefixes) as LoraPart[]).flatMap((part) =>
    [...(parts[part] ?? [])].map(([weight, changes]) => {
      const [{ down, outputs }] = changes as [LowRank];
      if (changes.some((other) => other.outputs !== outputs || other.down.shape[1] !== down.shape[1])) {
        throw new MmditxError(
          'bad-file',
          `The queries, keys and values of ${quote(weight)} in ${name} are of different sizes; use another file.`,
        );
      }
      return { part, weight, ...joinRows(changes) };
    }),
  );
}

function joinRows(changes: readonly LowRank[]): Pick<LoraLayer, 'down' | 'up' | 'alpha'> {
  const [first] = changes as [LowRank];
  const downs: { readonly down: FloatTensor; readonly start: number }[] = [];
  let rank = 0;
  const starts = changes.map(({ down }) => {
    const known = downs.find((other) => equal(other.down, down));
    if (known) return known.start;
    downs.push({ down, start: rank });
    rank += down.shape[0]!;
    return rank - down.shape[0]!;
  });
  // One alpha must do for all, so that factors that differ become part of the matrices.
  const scale = changes.every((change) => change.scale === first.scale) ? first.scale : 1;
  const inputs = first.down.shape[1]!;
  const joinedDown = new Float32Array(rank * inputs);
  for (const { down, start } of downs) joinedDown.set(down.data, start * inputs);
  const joinedUp = new Float32Array(first.outputs * rank);
  for (const [at, { up, rows, scale: own }] of changes.entries()) {
    const width = up.shape[1]!;
    const factor = own === scale ? 1 : own;
    for (let row = rows[0]; row < rows[1]; row++) {
      for (let i = 0; i < width; i++) {
        joinedUp[row * rank + starts[at]! + i] = factor * up.data[(row - rows[0]) * width + i]!;
      }
    }
  }
  return {
    down: floats([rank, inputs], joinedDown),
    up: floats([first.outputs, rank], joinedUp),
    alpha: scale * rank,
  };
}

function equal(a: FloatTensor, b: FloatTensor): boolean {
  return a.shape.join() === b.shape.join() && a.data.every((value, i) => value === b.data[i]);
}
