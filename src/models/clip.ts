/**
 * The CLIP text encoders, CLIP-L and OpenCLIP bigG (Radford et al. 2021): a causal transformer over 77 tokens.
 * Names of weights are those of transformers' `CLIPTextModelWithProjection`, which the SD3 files use.
 */

import * as t from '../tensor/index.ts';
import { CLIP_NORM_EPS, type ClipConfig } from './config.ts';
import { type Weights, within } from './weights.ts';

export interface ClipInputs {
  /** Token ids: int32 [batch, positions] */
  ids: t.Tensor;
  /** For each item, where its first end token lies in the flattened batch: int64 [batch] ({@link endOfText}). */
  end: t.Tensor;
}

export interface ClipOutputs {
  /** The last layer's input, not normalised, which is what SD3 attends to: [batch, positions, width] */
  hidden: t.Tensor;
  /** The normalised last layer at the end token, projected where the encoder has a projection: [batch, pooledWidth] */
  pooled: t.Tensor;
}

const batch = t.symbol('batch');

export function clipInputs({ positions }: ClipConfig): ClipInputs {
  return { ids: t.input('ids', 'int32', [batch, positions]), end: t.input('end', 'int64', [batch]) };
}

export function clip(config: ClipConfig, weights: Weights, { ids, end }: ClipInputs): ClipOutputs {
  const { width, layers, positions, vocabSize } = config;
  const text = within(weights, 'text_model');
  const tokens = t.gather(text('embeddings.token_embedding.weight', [vocabSize, width]), ids);
  let x = t.add(tokens, text('embeddings.position_embedding.weight', [positions, width]));
  let hidden = x;
  const mask = causalMask(positions);
  for (let layer = 0; layer < layers; layer++) {
    hidden = x;
    x = encoderLayer(config, within(text, `encoder.layers.${layer}`), x, mask);
  }
  const normal = layerNorm(within(text, 'final_layer_norm'), x, width);
  const atEnd = t.gather(t.reshape(normal, [t.times(t.size(ids, 0), positions), width]), end);
  const pooled = config.projection
    ? t.linear(atEnd, weights('text_projection.weight', [config.pooledWidth, width]))
    : atEnd;
  return { hidden, pooled };
}

function encoderLayer(config: ClipConfig, weights: Weights, x: t.Tensor, bias: t.Tensor): t.Tensor {
  const { width, heads, mlpWidth, activation } = config;
  const normal = layerNorm(within(weights, 'layer_norm1'), x, width);
  const project = (name: string, input: t.Tensor) =>
    dense(within(weights, `self_attn.${name}_proj`), input, width, width);
  const [query, key, value] = ['q', 'k', 'v'].map((name) => project(name, normal)) as [t.Tensor, t.Tensor, t.Tensor];
  const attended = t.add(x, project('out', t.attention(query, key, value, { heads, bias })));
  const wide = dense(
    within(weights, 'mlp.fc1'),
    layerNorm(within(weights, 'layer_norm2'), attended, width),
    width,
    mlpWidth,
  );
  const active = activation === 'quick_gelu' ? t.quickGelu(wide) : t.gelu(wide);
  return t.add(attended, dense(within(weights, 'mlp.fc2'), active, mlpWidth, width));
}

function layerNorm(weights: Weights, x: t.Tensor, width: number): t.Tensor {
  return t.add(t.multiply(t.layerNorm(x, CLIP_NORM_EPS), weights('weight', [width])), weights('bias', [width]));
}

function dense(weights: Weights, x: t.Tensor, width: number, out: number): t.Tensor {
  return t.linear(x, weights('weight', [out, width]), weights('bias', [out]));
}

/** A token sees itself and those before it: [1, 1, positions, positions]. */
function causalMask(positions: number): t.Tensor {
  const data = new Float32Array(positions * positions);
  for (let query = 0; query < positions; query++) {
    // Large enough to vanish after softmax; an infinity would turn into NaN on some devices.
    data.fill(-1e9, query * positions + query + 1, (query + 1) * positions);
  }
  return t.constant(t.floats([1, 1, positions, positions], data));
}

/**
 * Where the pooled output is read: the first end token of each item, in the flattened batch.
 * @param ids row-major [batch, positions]
 */
export function endOfText(ids: ArrayLike<number>, { positions, eosId }: ClipConfig): t.TensorData {
  const count = ids.length / positions;
  const data = new BigInt64Array(count);
  for (let item = 0; item < count; item++) {
    let end = positions - 1;
    for (let position = positions - 1; position >= 0; position--) {
      if (ids[item * positions + position] === eosId) end = position;
    }
    data[item] = BigInt(item * positions + end);
  }
  return { dtype: 'int64', shape: [count], data };
}
