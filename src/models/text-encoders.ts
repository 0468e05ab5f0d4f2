/** Running the text encoders. */

import type { RunOptions, Runtime } from '../runtime/runtime.ts';
import type { FloatTensor, TensorData } from '../tensor/index.ts';
import type { PartWeights } from '../weights/checkpoint.ts';
import { bindWeights, compileBound } from './bind.ts';
import { clip, clipInputs, endOfText } from './clip.ts';
import type { ClipConfig, T5Config } from './config.ts';
import { lazily } from './lazily.ts';
import { relativeBuckets, t5Encoder, t5Inputs } from './t5.ts';

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

type Bytes = ReadonlyMap<string, Uint8Array>;

/** Prepares a CLIP encoder; its weights load at the first use. */
export function loadClip(runtime: Runtime, part: PartWeights<ClipConfig>, bytes?: Bytes): ClipEncoder {
  const { config } = part;
  const network = lazily(() => {
    const bound = bindWeights(part, bytes);
    return compileBound(runtime, { outputs: { ...clip(config, bound.weights, clipInputs(config)) } }, bound);
  });
  return {
    config,
    dispose: network.dispose,
    async encode(ids, options) {
      const end = endOfText(ids.data as Int32Array, config);
      const outputs = await (await network.get()).run({ ids, end }, options);
      return outputs as { hidden: FloatTensor; pooled: FloatTensor };
    },
  };
}

/** Prepares a T5 encoder; its weights load at the first use. */
export function loadT5(runtime: Runtime, part: PartWeights<T5Config>, bytes?: Bytes): T5Encoder {
  const { config } = part;
  const network = lazily(() => {
    const bound = bindWeights(part, bytes);
    return compileBound(runtime, { outputs: { hidden: t5Encoder(config, bound.weights, t5Inputs()) } }, bound);
  });
  return {
    config,
    dispose: network.dispose,
    async encode(ids, options) {
      const buckets = relativeBuckets(ids.shape[1]!, config);
      return (await (await network.get()).run({ ids, buckets }, options)).hidden as FloatTensor;
    },
  };
}
