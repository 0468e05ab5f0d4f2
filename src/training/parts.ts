/** The networks of a training program: trained whole, changed by a LoRA, or left as they lie in their files. */

import { bindWeights } from '../models/bind.ts';
import type { Weights } from '../models/weights.ts';
import type { CompileOptions } from '../runtime/runtime.ts';
import type { TorchGenerator } from '../sampling/noise.ts';
import { floats, toFloat32 } from '../tensor/data.ts';
import { lowRankSum, multiply, parameter, slice, type Tensor } from '../tensor/index.ts';
import type { PartName, PartWeights } from '../weights/checkpoint.ts';
import { partPrefixes } from '../weights/convert.ts';
import { readWeight } from '../weights/stored.ts';
import type { LORA_TARGETS, LoraConfig } from './config.ts';
import type { Parameters } from './gradients.ts';

/** How a network takes part in training. */
export type Training = 'full' | 'lora' | 'frozen';

/** A network in a training program. */
export interface TrainedPart {
  /** What the names of its parameters begin with. */
  readonly prefix: string;
  /** Folders of the files that its weights are mapped from. */
  readonly folders: readonly string[];
  /** Its weights, for recording the program. */
  readonly weights: Weights;
  /** Where frozen weights come from. */
  readonly compile: CompileOptions;
  /** To be awaited before a program is compiled. */
  prepare(): Promise<void>;
}

/** Tables that are computed, not learned. */
const COMPUTED = /(^|\.)pos_embed$/;

/** The name of a trained parameter: the weight's name in the official file. */
export function parameterName(part: PartName, weight: string): string {
  return partPrefixes[part] + weight;
}

/**
 * A network whose weights are all trained, except for its computed tables.
 * @param values by {@link parameterName}: trained and computed weights alike
 */
export function wholePart(part: PartName, values: Parameters): TrainedPart {
  const recorded = new Map<string, Tensor>();
  return {
    prefix: partPrefixes[part],
    folders: [],
    weights(name, shape) {
      const full = parameterName(part, name);
      const known = recorded.get(full) ?? parameter(full, 'float32', shape);
      recorded.set(full, known);
      return known;
    },
    compile: {
      bind({ name, shape }) {
        const value = values.get(name!);
        if (!value) throw new RangeError(`The network asks for ${name}, which has no value.`);
        return floats(shape as number[], value.data);
      },
    },
    prepare: async () => undefined,
  };
}

/** Whether a parameter of {@link wholePart} is learned. */
export function isLearned(name: string): boolean {
  return !COMPUTED.test(name);
}

/** All weights of a network in float32, by {@link parameterName}. */
export async function readParameters(part: PartName, { tensors }: PartWeights<unknown>): Promise<Parameters> {
  const values: Parameters = new Map();
  for (const [name, tensor] of tensors) {
    const data = toFloat32(await readWeight(tensor));
    values.set(parameterName(part, name), floats(tensor.shape, data.slice()));
  }
  return values;
}

/** A network that stays as it lies in its file. */
export function frozenPart(part: PartName, source: PartWeights<unknown>): TrainedPart {
  const bound = bindWeights(source, { label: partPrefixes[part], expandWeights: false, packWeights: false });
  const paths = bound.sources.flatMap(({ path }) => path ?? []);
  const folders = [...new Set(paths.map((path) => path.slice(0, path.search(/[^/\\]*$/))))];
  return {
    prefix: partPrefixes[part],
    folders,
    weights: bound.weights,
    compile: bound,
    async prepare() {
      // A file that became shorter while it is mapped would end the process without a word.
      await Promise.all(bound.sources.map((source) => source.requireUnchanged?.()));
      await bound.read();
    },
  };
}

/** A layer that a LoRA changes. */
export interface AdaptedLayer {
  readonly part: PartName;
  /** The weight's name in its network. */
  readonly weight: string;
  /** Names of its two trained matrices. */
  readonly down: string;
  readonly up: string;
}

/** The input that leaves ranks out: [layers, rank], 0 or 1 / (1 - dropout). */
export const KEPT_RANKS = 'lora.kept';

export interface LoraOptions {
  readonly config: LoraConfig;
  /** All layers that the run adapts, of every network: their order is that of the rows of {@link KEPT_RANKS}. */
  readonly layers: readonly AdaptedLayer[];
  /** The input {@link KEPT_RANKS}, where there is dropout. */
  readonly kept?: Tensor | undefined;
}

/** A network of frozen weights, to some of which a trained product of two narrow matrices is added. */
export function adaptedPart(part: PartName, source: PartWeights<unknown>, options: LoraOptions): TrainedPart {
  const { config, layers, kept } = options;
  const frozen = frozenPart(part, source);
  const indices = new Map(layers.flatMap((layer, i) => (layer.part === part ? [[layer.weight, i] as const] : [])));
  const adapted = new Map<string, Tensor>();
  return {
    ...frozen,
    weights(name, shape) {
      const known = adapted.get(name);
      if (known) return known;
      const base = frozen.weights(name, shape);
      const index = indices.get(name);
      if (index === undefined) return base;
      const [out, width] = shape as [number, number];
      const { down, up } = layers[index]!;
      let factor = multiply(parameter(up, 'float32', [out, config.rank]), loraScale(config));
      if (kept) factor = multiply(factor, slice(kept, 0, index, 1));
      const sum = lowRankSum(base, factor, parameter(down, 'float32', [config.rank, width]));
      adapted.set(name, sum);
      return sum;
    },
  };
}

/** Alpha / rank. */
export function loraScale({ rank, alpha = rank }: Pick<LoraConfig, 'rank' | 'alpha'>): number {
  return alpha / rank;
}

type Target = (typeof LORA_TARGETS)[number];

/** The linear layers of each network that a LoRA may change, by kind. */
const TARGETS: Readonly<Record<Exclude<PartName, 'vae'>, Partial<Record<Target, RegExp>>>> = {
  transformer: {
    attention: /^joint_blocks\.\d+\.(x|context)_block\.attn2?\.(qkv|proj)\.weight$/,
    mlp: /^joint_blocks\.\d+\.(x|context)_block\.mlp\.fc[12]\.weight$/,
    modulation: /^joint_blocks\.\d+\.(x|context)_block\.adaLN_modulation\.1\.weight$/,
    embedders: /^(context_embedder|[ty]_embedder\.mlp\.[02])\.weight$/,
    output: /^final_layer\.(linear|adaLN_modulation\.1)\.weight$/,
  },
  clipL: {
    attention: /\.self_attn\.(q|k|v|out)_proj\.weight$/,
    mlp: /\.mlp\.fc[12]\.weight$/,
  },
  clipG: {
    attention: /\.self_attn\.(q|k|v|out)_proj\.weight$/,
    mlp: /\.mlp\.fc[12]\.weight$/,
  },
  t5: {
    attention: /\.SelfAttention\.[qkvo]\.weight$/,
    mlp: /\.DenseReluDense\.(wi_0|wi_1|wo)\.weight$/,
  },
};

/**
 * The layers of a network that a LoRA of this configuration changes. `streams` and `blocks` concern the transformer's
 * joint blocks only. The context of the last block ends at its keys and values, so that it has no output of its own.
 */
export function adaptedLayers(
  part: Exclude<PartName, 'vae'>,
  source: PartWeights<unknown>,
  config: LoraConfig,
): AdaptedLayer[] {
  const { targets, streams, blocks } = config;
  const wanted = targets.flatMap((target) => TARGETS[part][target] ?? []);
  return [...source.tensors.keys()]
    .filter((weight) => wanted.some((pattern) => pattern.test(weight)))
    .filter((weight) => {
      const [, block, stream] = /^joint_blocks\.(\d+)\.(x|context)_block\./.exec(weight) ?? [];
      if (block === undefined) return true;
      return streams.includes(stream === 'x' ? 'image' : 'context') && (blocks?.includes(Number(block)) ?? true);
    })
    .map((weight) => {
      const name = parameterName(part, weight).replace(/\.weight$/, '');
      return { part, weight, down: `${name}.lora_down`, up: `${name}.lora_up` };
    });
}

/**
 * A LoRA that changes nothing yet: `up` is zero, `down` uniform within 1 / sqrt(inputs), which is torch's
 * `kaiming_uniform_(a=sqrt(5))` that kohya sd-scripts begins with.
 */
export function initialLora(
  layers: readonly AdaptedLayer[],
  { rank }: LoraConfig,
  sources: { readonly [Part in PartName]?: PartWeights<unknown> | undefined },
  random: TorchGenerator,
): Parameters {
  const values: Parameters = new Map();
  for (const { part, weight, down, up } of layers) {
    const [out, ...rest] = sources[part]!.tensors.get(weight)!.shape as [number, ...number[]];
    const width = rest.reduce((a, b) => a * b, 1);
    const bound = 1 / Math.sqrt(width);
    values.set(
      down,
      floats(
        [rank, width],
        random.uniform(rank * width).map((draw) => bound * (2 * draw - 1)),
      ),
    );
    values.set(up, floats([out, rank], new Float32Array(out * rank)));
  }
  return values;
}

/** How the frozen weights of several networks in one program are bound, and what has to be read before. */
export function joinParts(parts: readonly TrainedPart[]): { compile: CompileOptions; prepare(): Promise<void> } {
  const inFiles = parts.some(({ compile }) => compile.expandWeights === false);
  return {
    compile: {
      bind(tensor) {
        const owner = parts.find(({ prefix }) => tensor.name!.startsWith(prefix));
        if (!owner) throw new RangeError(`No network of the program has ${tensor.name}.`);
        return owner.compile.bind(tensor);
      },
      get files() {
        const files = parts.flatMap(({ compile }) => compile.files ?? []);
        return [...new Map(files.map((file) => [file.name, file])).values()];
      },
      // Expanding 16 bits once would keep two copies of a large model, and packing another.
      ...(inFiles && { expandWeights: false, packWeights: false, keepBuffers: false }),
    },
    prepare: async () => void (await Promise.all(parts.map((part) => part.prepare()))),
  };
}
