/**
 * The encoder of T5 v1.1 (Raffel et al. 2020, with Shazeer's gated GELU): bidirectional, positions only through a
 * learned bias on distances. Padding is attended to, as Stable Diffusion 3 was trained. Names of weights are those
 * of transformers' `T5EncoderModel`.
 */

import * as t from '../tensor/index.ts';
import { T5_NORM_EPS, type T5Config } from './config.ts';
import { type Weights, within } from './weights.ts';

export interface T5Inputs {
  /** Token ids: int32 [batch, tokens] */
  ids: t.Tensor;
  /** {@link relativeBuckets} of the length: int32 [tokens, tokens] */
  buckets: t.Tensor;
}

const batch = t.symbol('batch');
const tokens = t.symbol('tokens');

export function t5Inputs(): T5Inputs {
  return { ids: t.input('ids', 'int32', [batch, tokens]), buckets: t.input('buckets', 'int32', [tokens, tokens]) };
}

/** The normalised last hidden state: [batch, tokens, width]. This is the whole encoder; {@link t5Segment} is a part of it. */
export function t5Encoder(config: T5Config, weights: Weights, { ids, buckets }: T5Inputs): t.Tensor {
  const bias = distanceBias(config, weights, buckets);
  let x = embed(config, weights, ids);
  for (let layer = 0; layer < config.layers; layer++) x = block(config, weights, x, bias, layer);
  return finalNorm(config, weights, x);
}

/**
 * The layers from `start` to before `end`, the embedding before the first and the norm after the last, as a program of
 * its own: it takes `ids` or the `hidden` state before its first layer, and `buckets`, and gives `hidden`.
 */
export function t5Segment(config: T5Config, weights: Weights, start: number, end: number): t.Program {
  const { ids, buckets } = t5Inputs();
  const bias = distanceBias(config, weights, buckets);
  let x = start === 0 ? embed(config, weights, ids) : t.input('hidden', 'float32', [batch, tokens, config.width]);
  for (let layer = start; layer < end; layer++) x = block(config, weights, x, bias, layer);
  return { outputs: { hidden: end === config.layers ? finalNorm(config, weights, x) : x } };
}

function embed({ vocabSize, width }: T5Config, weights: Weights, ids: t.Tensor): t.Tensor {
  return t.gather(weights('shared.weight', [vocabSize, width]), ids);
}

function finalNorm({ width }: T5Config, weights: Weights, x: t.Tensor): t.Tensor {
  return t.rmsNorm(x, weights('encoder.final_layer_norm.weight', [width]), T5_NORM_EPS);
}

/** What attention adds for each distance, [1, heads, tokens, tokens]; the first block's table serves all blocks. */
function distanceBias(config: T5Config, weights: Weights, buckets: t.Tensor): t.Tensor {
  const name = 'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight';
  const perHead = t.transpose(t.gather(weights(name, [config.buckets, config.heads]), buckets), [2, 0, 1]);
  return t.reshape(perHead, [1, ...perHead.shape]);
}

function block(config: T5Config, all: Weights, x: t.Tensor, bias: t.Tensor, layer: number): t.Tensor {
  const weights = within(all, `encoder.block.${layer}`);
  const attended = t.add(x, selfAttention(config, within(weights, 'layer.0'), x, bias));
  return t.add(attended, feedForward(config, within(weights, 'layer.1'), attended));
}

/** Attention with the distance bias and without the usual scale. */
function selfAttention({ width, heads, headDim }: T5Config, weights: Weights, x: t.Tensor, bias: t.Tensor): t.Tensor {
  const inner = heads * headDim;
  const normal = t.rmsNorm(x, weights('layer_norm.weight', [width]), T5_NORM_EPS);
  const [query, key, value] = ['q', 'k', 'v'].map((name) =>
    t.linear(normal, weights(`SelfAttention.${name}.weight`, [inner, width])),
  ) as [t.Tensor, t.Tensor, t.Tensor];
  const attended = t.attention(query, key, value, { heads, bias, scale: 1 });
  return t.linear(attended, weights('SelfAttention.o.weight', [width, inner]));
}

/** wo(gelu(wi_0 x) * wi_1 x) */
function feedForward({ width, mlpWidth }: T5Config, weights: Weights, x: t.Tensor): t.Tensor {
  const normal = t.rmsNorm(x, weights('layer_norm.weight', [width]), T5_NORM_EPS);
  const gate = t.geluTanh(t.linear(normal, weights('DenseReluDense.wi_0.weight', [mlpWidth, width])));
  const value = t.linear(normal, weights('DenseReluDense.wi_1.weight', [mlpWidth, width]));
  const wo = weights('DenseReluDense.wo.weight', [width, mlpWidth]);
  // Some of these values are thousands of times larger than the rest: transformers keeps this layer in float32.
  return t.linear(t.multiply(gate, value), wo, undefined, { exact: true });
}

/**
 * The bucket of every distance key - query: half of the buckets for each sign, the nearer half of those exact, the
 * rest logarithmic up to `maxDistance` (T5's `_relative_position_bucket`, computed in float32).
 */
export function relativeBuckets(length: number, { buckets, maxDistance }: T5Config): t.TensorData {
  const data = new Int32Array(length * length);
  const perDistance = new Int32Array(2 * length - 1).map((_, i) => bucketOf(i - (length - 1), buckets, maxDistance));
  for (let query = 0; query < length; query++) {
    for (let key = 0; key < length; key++) data[query * length + key] = perDistance[key - query + length - 1]!;
  }
  return { dtype: 'int32', shape: [length, length], data };
}

/** The bucket of one signed distance, positive where the key comes after the query. */
export function bucketOf(distance: number, buckets: number, maxDistance: number): number {
  const { fround } = Math;
  const perSign = buckets / 2;
  const exact = perSign / 2;
  const offset = distance > 0 ? perSign : 0;
  const far = Math.abs(distance);
  if (far < exact) return offset + far;
  const ratio = fround(fround(Math.log(fround(far / exact))) / fround(Math.log(maxDistance / exact)));
  return offset + Math.min(exact + Math.floor(fround(ratio * (perSign - exact))), perSign - 1);
}
