/**
 * LoRA: changes to weights as products of two narrow matrices (Hu et al. 2021, arXiv 2106.09685), read from files of
 * every common layout and combined into one change of each weight.
 */

import { z } from 'zod';
import { MmditxError } from '../errors.ts';
import { type DType, elementCount, type FloatTensor, floats, toFloat32 } from '../tensor/data.ts';
import { partTitles } from './checkpoint.ts';
import type { TensorShapes } from './expected.ts';
import { isFiniteNumber, parseJson } from './json.ts';
import {
  ADAPTER_METADATA_KEY,
  diffusersPrefixes,
  foreignLora,
  type LoraPart,
  type LoraRole,
  type LoraTarget,
  loraKey,
  loraTarget,
  otherLoraKind,
} from './lora-names.ts';
import { quote } from './quote.ts';
import { type ByteSource, openSafetensors, readTensor, type SafetensorsFile } from './safetensors.ts';

/** A change of a weight: `scale * up @ down`, added to some of its rows. */
export interface LowRank {
  /** [rank, inputs]; of a convolution, inputs are channels and places of its kernel together. */
  readonly down: FloatTensor;
  /** [end - start, rank] */
  readonly up: FloatTensor;
  /** Alpha / rank. */
  readonly scale: number;
  /** The rows that change: [start, end). */
  readonly rows: readonly [start: number, end: number];
  /** Rows of the whole weight, as the file implies. */
  readonly outputs: number;
}

export interface Lora {
  /** The file's name. */
  readonly name: string;
  /** Changes of each network by the names of its weights, as in `expected.ts`. */
  readonly parts: { readonly [Part in LoraPart]?: ReadonlyMap<string, readonly LowRank[]> };
  /** Names of the tensors that nothing here uses, in the file's order. */
  readonly unused: readonly string[];
}

/** The tensors of one layer in the file. */
type LayerTensors = { readonly [Role in LoraRole]?: string };

const floatTypes: ReadonlySet<DType> = new Set([
  'float64',
  'float32',
  'float16',
  'bfloat16',
  'float8e4m3',
  'float8e5m2',
]);

/**
 * Reads a LoRA in any of these layouts, and mixtures of them:
 *
 * | layout | names of tensors |
 * |---|---|
 * | kohya-ss/sd-scripts | `lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight`, `lora_te1_…` CLIP-L, `lora_te2_…` CLIP-G, `lora_te3_…` T5 |
 * | diffusers | `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`, `text_encoder.…`, `text_encoder_2.…`, `text_encoder_3.…` |
 * | PEFT | `base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight` |
 * | OneTrainer | `lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight` |
 * | ComfyUI | `diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight` |
 *
 * A layer's scale is alpha / rank, with alpha from its `.alpha` tensor, else from what diffusers writes into the
 * metadata, else the rank. PEFT keeps alpha in another file, adapter_config.json, which is not read.
 *
 * @throws MmditxError `bad-file` for a damaged or incomplete file; `unsupported-model` for a LoRA of another model,
 *   of another kind (DoRA, LoHa, LoKr), or for a file that holds none
 */
export async function openLora(source: ByteSource): Promise<Lora> {
  const file = await openSafetensors(source);
  const { layers, unused } = findLayers(file);
  const alphas = readAlphas(file);
  const parts: { [Part in LoraPart]?: Map<string, LowRank[]> } = {};
  for (const [layer, tensors] of layers) {
    const target = loraTarget(layer)!;
    const changes = parts[target.part] ?? new Map<string, LowRank[]>();
    parts[target.part] = changes;
    const change = await readChange(file, layer, tensors, target, alphas);
    const others = changes.get(target.weight) ?? [];
    if (others.some(({ rows: [start, end] }) => start < change.rows[1] && change.rows[0] < end)) {
      throw new MmditxError(
        'bad-file',
        `${source.name} changes ${quote(target.weight)} twice, the second time as ${quote(layer)}; use a file in one layout.`,
      );
    }
    changes.set(target.weight, [...others, change]);
  }
  return { name: source.name, parts, unused };
}

/** The layers whose tensors can be used, and the names of the other tensors. */
function findLayers({ source, tensors }: SafetensorsFile): { layers: Map<string, LayerTensors>; unused: string[] } {
  const layers = new Map<string, LayerTensors>();
  const strangers: string[] = [];
  for (const name of tensors.keys()) {
    const key = loraKey(name);
    if (!key || !loraTarget(key.layer)) {
      strangers.push(name);
      continue;
    }
    const known = layers.get(key.layer);
    if (known?.[key.role] !== undefined) {
      throw new MmditxError(
        'bad-file',
        `${source.name} holds both ${quote(known[key.role]!)} and ${quote(name)}; use a file with one LoRA in one layout.`,
      );
    }
    layers.set(key.layer, { ...known, [key.role]: name });
  }

  const foreign = foreignLora(strangers);
  if (foreign) {
    throw new MmditxError(
      'unsupported-model',
      `${source.name} is a LoRA for ${foreign.model} (it holds ${quote(foreign.name)}); use one for Stable Diffusion 3.5.`,
    );
  }
  const other = otherLoraKind(strangers);
  if (other) {
    throw new MmditxError(
      'unsupported-model',
      `${source.name} is of the kind ${other.kind} (it holds ${quote(other.name)}), which this version does not read; use a plain LoRA.`,
    );
  }
  for (const [layer, { down, up, alpha }] of layers) {
    if (down !== undefined && up !== undefined) continue;
    if (down !== undefined || up !== undefined) {
      const [present, missing] = up === undefined ? [down, 'up'] : [up, 'down'];
      throw new MmditxError(
        'bad-file',
        `${source.name} holds ${quote(present!)} without the ${missing} matrix that belongs to it; the file is incomplete, download it again.`,
      );
    }
    strangers.push(alpha!);
    layers.delete(layer);
  }
  if (layers.size === 0) {
    const examples = strangers.slice(0, 3).map((name) => quote(name));
    const found = examples.length ? `its tensors have names like ${examples.join(', ')}` : 'it holds no tensors';
    throw new MmditxError(
      'unsupported-model',
      `${source.name} holds no LoRA for Stable Diffusion 3 (${found}); use one for Stable Diffusion 3.5, in the layout of kohya, diffusers or ComfyUI.`,
    );
  }
  const left = new Set(strangers);
  return { layers, unused: [...tensors.keys()].filter((name) => left.has(name)) };
}

async function readChange(
  file: SafetensorsFile,
  layer: string,
  tensors: LayerTensors,
  { part, module, third, swapped }: LoraTarget,
  alphas: ReadonlyMap<LoraPart, AlphaRule>,
): Promise<LowRank> {
  const down = await readMatrix(file, tensors.down!);
  let up = await readMatrix(file, tensors.up!);
  const [rank, inputs] = down.shape as [number, number];
  const [outputs, columns] = up.shape as [number, number];
  if (columns !== rank) {
    throw new MmditxError(
      'bad-file',
      `The matrices of ${quote(layer)} in ${file.source.name} do not fit each other: ${quote(up.shape)} and ${quote(down.shape)}; download the file again.`,
    );
  }
  if (swapped === 'always' || (swapped === 'last block' && outputs === 2 * inputs)) up = swapHalves(up);
  const alpha = tensors.alpha === undefined ? undefined : await readAlpha(file, tensors.alpha);
  const scale = alpha === undefined ? (alphas.get(part)?.(module, rank) ?? 1) : alpha / rank;
  return third === undefined
    ? { down, up, scale, rows: [0, outputs], outputs }
    : { down, up, scale, rows: [third * outputs, (third + 1) * outputs], outputs: THIRDS * outputs };
}

/** Queries, keys and values lie one after the other in one weight. */
const THIRDS = 3;

/** A tensor as [first dimension, all others]. */
async function readMatrix(file: SafetensorsFile, name: string): Promise<FloatTensor> {
  const { dtype, shape } = file.tensors.get(name)!;
  if (!floatTypes.has(dtype) || shape.length < 2 || shape.includes(0)) {
    throw new MmditxError(
      'bad-file',
      `Tensor ${quote(name)} of ${file.source.name} is ${dtype} ${quote(shape)}, not a matrix of a LoRA; download the file again.`,
    );
  }
  const data = toFloat32(await readTensor(file, name));
  requireFinite(file, name, data);
  return floats([shape[0]!, elementCount(shape.slice(1))], data);
}

async function readAlpha(file: SafetensorsFile, name: string): Promise<number> {
  const { shape } = file.tensors.get(name)!;
  if (elementCount(shape) !== 1) {
    throw new MmditxError(
      'bad-file',
      `Tensor ${quote(name)} of ${file.source.name} is of shape ${quote(shape)} where a single number is expected; download the file again.`,
    );
  }
  const data = toFloat32(await readTensor(file, name));
  requireFinite(file, name, data);
  return data[0]!;
}

function requireFinite({ source }: SafetensorsFile, name: string, values: Float32Array): void {
  if (values.every(Number.isFinite)) return;
  throw new MmditxError(
    'bad-file',
    `Tensor ${quote(name)} of ${source.name} holds values that are not finite; the LoRA is broken, use another.`,
  );
}

/** Exchanges the first and the second half of the rows. */
function swapHalves({ shape, data }: FloatTensor): FloatTensor {
  const half = (Math.floor(shape[0]! / 2) * data.length) / shape[0]!;
  const swapped = new Float32Array(data.length);
  swapped.set(data.subarray(half));
  swapped.set(data.subarray(0, half), data.length - half);
  return floats(shape, swapped);
}

/** The scale of a layer by its name and rank. */
type AlphaRule = (module: string, rank: number) => number;

/** Characters of a pattern in a message. */
const MAX_SHOWN = 100;

/** PEFT's `LoraConfig`, what of it decides the scale. */
const adapterSchema = z.object({
  lora_alpha: z.number(),
  alpha_pattern: z.record(z.string(), z.unknown()).nullish(),
  use_rslora: z.boolean().nullish(),
});

/** The rules by which diffusers' metadata gives the scales; of networks it says nothing about, there is none. */
function readAlphas({ source, metadata }: SafetensorsFile): Map<LoraPart, AlphaRule> {
  const rules = new Map<LoraPart, AlphaRule>();
  const text = metadata[ADAPTER_METADATA_KEY];
  if (text === undefined) return rules;
  const refuse = (found: string) =>
    new MmditxError(
      'bad-file',
      `The metadata entry ${ADAPTER_METADATA_KEY} of ${source.name} ${found}; save the file again or remove the entry.`,
    );
  const members = z.record(z.string(), z.unknown()).safeParse(parseJson(text, refuse));
  if (!members.success) throw refuse('is not a JSON object');
  for (const [part, prefix] of Object.entries(diffusersPrefixes) as [LoraPart, string][]) {
    const member = (name: keyof z.infer<typeof adapterSchema>) => members.data[`${prefix}.${name}`];
    if (member('lora_alpha') === undefined) continue;
    const adapter = adapterSchema.safeParse({
      lora_alpha: member('lora_alpha'),
      alpha_pattern: member('alpha_pattern'),
      use_rslora: member('use_rslora'),
    });
    if (!adapter.success) throw refuse(`is wrong at ${prefix}.${adapter.error.issues[0]?.path.join('.')}`);
    const { lora_alpha: general, alpha_pattern: patterns, use_rslora: rankStabilized } = adapter.data;
    const particular = new Map<string, { alpha: number; place: number }>();
    for (const [pattern, alpha] of Object.entries(patterns ?? {})) {
      const end = literalPattern(pattern);
      if (end === undefined)
        throw refuse(`has the regular expression ${quote(pattern)}, which this version does not read`);
      if (!isFiniteNumber(alpha)) throw refuse(`is wrong at ${prefix}.alpha_pattern.${end.slice(0, MAX_SHOWN)}`);
      if (!particular.has(end)) particular.set(end, { alpha, place: particular.size });
    }
    rules.set(part, (module, rank) => {
      // Of several that fit, the first in the file counts.
      const [own] = endsOf(module)
        .flatMap((end) => particular.get(end) ?? [])
        .sort((a, b) => a.place - b.place);
      // Rank-stabilised LoRA divides by the root of the rank (Kalajdzievski 2023, arXiv 2312.03732).
      return (own?.alpha ?? general) / (rankStabilized ? Math.sqrt(rank) : rank);
    });
  }
  return rules;
}

/**
 * PEFT's patterns are regular expressions for the end of a module's name, from a dot on. Those that diffusers writes
 * are names; others are not run, as an expression from a file could run for ever.
 */
function literalPattern(pattern: string): string | undefined {
  const name = pattern.replace(/^\^/, '').replaceAll('\\.', '.').replace(/\$$/, '');
  return /^[\w.]+$/.test(name) ? name : undefined;
}

/** A name and what is left of it behind each of its dots. */
function endsOf(name: string): string[] {
  const parts = name.split('.');
  return parts.map((_, start) => parts.slice(start).join('.'));
}

/** Bound of a LoRA's strength either way: far beyond what leaves a picture, and small enough to compute with. */
export const MAX_LORA_STRENGTH = 100;

/** A LoRA as it is to be used. */
export interface LoraUse {
  readonly lora: Lora;
  /** Factor on the changes of the transformer, -100 to 100: 0 changes nothing, 1 is what was trained. */
  readonly strength: number;
  /** Factor on the changes of the text encoders, -100 to 100 (default `strength`). */
  readonly clipStrength?: number;
}

/** A change of a whole weight: `W + up @ down`. */
export interface CombinedChange {
  /** [rank, inputs], inputs being the product of all dimensions of the weight but the first. */
  readonly down: FloatTensor;
  /** [outputs, rank], scales and strengths included; ranks of all LoRAs together. */
  readonly up: FloatTensor;
}

/**
 * Combines LoRAs into one change of each weight that any of them changes at a strength other than 0:
 * `W + sum(strength * alpha / rank * up @ down)`, each in the rows that it is for.
 *
 * @param part the network
 * @param shapes of the network's weights, by name
 * @throws MmditxError `bad-option` for a strength out of range or a LoRA that does not fit the network
 */
export function combineLoras(
  loras: readonly LoraUse[],
  part: LoraPart,
  shapes: TensorShapes,
): Map<string, CombinedChange> {
  const changes = new Map<string, { change: LowRank; factor: number }[]>();
  for (const { lora, strength, clipStrength = strength } of loras) {
    for (const value of [strength, clipStrength]) requireStrength(lora.name, value);
    const used = part === 'transformer' ? strength : clipStrength;
    for (const [weight, own] of lora.parts[part] ?? []) {
      for (const change of own) requireFit(lora.name, part, weight, change, shapes.get(weight));
      if (used === 0) continue;
      const all = changes.get(weight) ?? [];
      changes.set(weight, [...all, ...own.map((change) => ({ change, factor: used * change.scale }))]);
    }
  }
  return new Map([...changes].map(([weight, all]) => [weight, join(all)]));
}

/** Matrices side by side: those of `down` below each other, those of `up` beside each other, each in its rows. */
function join(changes: readonly { change: LowRank; factor: number }[]): CombinedChange {
  const { down, outputs } = changes[0]!.change;
  const inputs = down.shape[1]!;
  const ranks = changes.reduce((sum, { change }) => sum + change.down.shape[0]!, 0);
  const joinedDown = new Float32Array(ranks * inputs);
  const joinedUp = new Float32Array(outputs * ranks);
  let first = 0;
  for (const { change, factor } of changes) {
    const rank = change.down.shape[0]!;
    const [start, end] = change.rows;
    joinedDown.set(change.down.data, first * inputs);
    for (let row = start; row < end; row++) {
      for (let i = 0; i < rank; i++) {
        joinedUp[row * ranks + first + i] = factor * change.up.data[(row - start) * rank + i]!;
      }
    }
    first += rank;
  }
  return { down: floats([ranks, inputs], joinedDown), up: floats([outputs, ranks], joinedUp) };
}

function requireStrength(name: string, strength: number): void {
  if (Number.isFinite(strength) && Math.abs(strength) <= MAX_LORA_STRENGTH) return;
  throw new MmditxError(
    'bad-option',
    `The strength of ${name} is ${strength}; give a number from -${MAX_LORA_STRENGTH} to ${MAX_LORA_STRENGTH}.`,
  );
}

function requireFit(
  name: string,
  part: LoraPart,
  weight: string,
  { outputs, down }: LowRank,
  shape: readonly number[] | undefined,
): void {
  const found = [outputs, down.shape[1]!];
  const refuse = (actual: string) =>
    new MmditxError(
      'bad-option',
      `${name} does not fit this model: it changes ${quote(weight)} as ${quote(found)}, ${actual}; use a LoRA made for this model.`,
    );
  if (!shape) throw refuse(`which the ${partTitles[part]} does not have`);
  const needed = [shape[0]!, elementCount(shape.slice(1))];
  if (found.join() !== needed.join()) throw refuse(`but in the ${partTitles[part]} it is ${quote(needed)}`);
}
