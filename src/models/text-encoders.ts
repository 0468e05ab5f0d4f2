/** Running the text encoders. */

import type { RunOptions, Runtime } from '../runtime/runtime.ts';
import type { FloatTensor, TensorData } from '../tensor/index.ts';
import type { PartWeights } from '../weights/checkpoint.ts';
import { storedBytes } from '../weights/stored.ts';
import { bindWeights, compileBound, type NetworkOptions } from './bind.ts';
import { clip, clipInputs, endOfText } from './clip.ts';
import type { ClipConfig, T5Config } from './config.ts';
import { type Lazy, lazily } from './lazily.ts';
import { relativeBuckets, t5Segment } from './t5.ts';

export interface ClipEncoder {
  readonly config: ClipConfig;
  /**
   * @param ids int32 [batch, positions]
   * @returns `hidden` [batch, positions, width] and `pooled` [batch, pooledWidth]
   */
  encode(ids: TensorData, options?: RunOptions): Promise<{ hidden: FloatTensor; pooled: FloatTensor }>;
  dispose(): Promise<void>;
}

export interface T5Encoder {
  readonly config: T5Config;
  /**
   * @param ids int32 [batch, tokens]
   * @returns [batch, tokens, width]
   */
  encode(ids: TensorData, options?: RunOptions): Promise<FloatTensor>;
  dispose(): Promise<void>;
}

export interface EncoderOptions extends NetworkOptions {
  /**
   * Give the memory back after each use (default false): the encoder loads anew, layers at a time where it is large, and
   * its weights are used where they are mapped.
   */
  readonly release?: boolean | undefined;
}

/** Prepares a CLIP encoder; its weights load at the first use. */
export function loadClip(
  runtime: Runtime,
  part: PartWeights<ClipConfig>,
  { release = false, ...options }: EncoderOptions = {},
): ClipEncoder {
  const { config } = part;
  const network = lazily(() => {
    const bound = bindWeights(part, release ? { ...options, packWeights: false } : options);
    return compileBound(runtime, { outputs: { ...clip(config, bound.weights, clipInputs(config)) } }, bound);
  });
  return {
    config,
    dispose: network.dispose,
    async encode(ids, run) {
      const end = endOfText(ids.data as Int32Array, config);
      const outputs = await (await network.get()).run({ ids, end }, run);
      if (release) await network.dispose();
      return outputs as { hidden: FloatTensor; pooled: FloatTensor };
    },
  };
}

/** Prepares a T5 encoder; its weights load at the first use. */
export function loadT5(
  runtime: Runtime,
  part: PartWeights<T5Config>,
  { release = false, ...options }: EncoderOptions = {},
): T5Encoder {
  const { config } = part;
  const layers = release ? layersAtOnce(part) : config.layers;
  const segments: Lazy[] = [];
  for (let start = 0; start < config.layers; start += layers) {
    segments.push(
      lazily(() => {
        const bound = bindWeights(part, release ? { ...options, packWeights: false } : options);
        const end = Math.min(start + layers, config.layers);
        return compileBound(runtime, t5Segment(config, bound.weights, start, end), bound);
      }),
    );
  }
  return {
    config,
    dispose: async () => void (await Promise.all(segments.map((segment) => segment.dispose()))),
    async encode(ids, run) {
      const buckets = relativeBuckets(ids.shape[1]!, config);
      let flow: Record<string, TensorData> = { ids };
      for (const segment of segments) {
        flow = await (await segment.get()).run({ ...flow, buckets }, run);
        if (release) await segment.dispose();
      }
      return flow.hidden as FloatTensor;
    },
  };
}

/** Weights that a segment of T5 may have where memory is given back. */
const SEGMENT_BYTES = 2 ** 29;

function layersAtOnce({ config, tensors }: PartWeights<T5Config>): number {
  const layer = [...tensors].filter(([name]) => name.startsWith('encoder.block.0.'));
  const bytes = layer.reduce((sum, [, weight]) => sum + storedBytes(weight), 0);
  return Math.min(Math.max(Math.floor(SEGMENT_BYTES / bytes), 1), config.layers);
}
