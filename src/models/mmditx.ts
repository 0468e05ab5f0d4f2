/**
 * MMDiT-X: the diffusion transformer of Stable Diffusion 3.5 Medium.
 *
 * Text and image tokens are two streams with weights of their own that attend to each other (SD3 paper, section 4,
 * figure 2); the first blocks attend a second time within the image (SD3.5 model card). Names of weights are those
 * of the released checkpoint (Stability-AI/sd3.5, mmditx.py).
 *
 * The model can also be recorded in segments, so that blocks can be skipped, run apart or shared between passes
 * without conditionals in the graph.
 */

import * as t from '../tensor/index.ts';
import { QK_NORM_EPS, TIMESTEP_MAX_PERIOD, TRANSFORMER_NORM_EPS, type TransformerConfig } from './config.ts';
import { type Weights, within } from './weights.ts';

/** What the transformer is given. Symbols: batch, rows and columns of patches, length of the text. */
export interface TransformerInputs {
  /** [batch, inChannels, rows * patch, columns * patch] */
  latent: t.Tensor;
  /** {@link timestepEmbedding} of 1000 * sigma: [batch, timestepWidth] */
  timestep: t.Tensor;
  /** [batch, length, contextWidth] */
  context: t.Tensor;
  /** [batch, pooledWidth] */
  pooled: t.Tensor;
  /** Row and column of the position table where the latent's first patch lies: int64 [2] */
  corner: t.Tensor;
}

/** What flows from block to block. */
interface Streams {
  /** Image tokens [batch, rows * columns, hidden]. */
  image: t.Tensor;
  /** Text tokens [batch, length, hidden]. */
  context: t.Tensor;
  /** Timestep and pooled text [batch, hidden]: what every block is modulated by. */
  conditioning: t.Tensor;
}

const batch = t.symbol('batch');
const rows = t.symbol('rows');
const columns = t.symbol('columns');
const length = t.symbol('length');

/** The symbolic inputs of the whole transformer. */
export function transformerInputs(config: TransformerConfig): TransformerInputs {
  const { patchSize, inChannels, contextWidth, pooledWidth, timestepWidth } = config;
  const latent = [batch, inChannels, t.times(rows, patchSize), t.times(columns, patchSize)];
  return {
    latent: t.input('latent', 'float32', latent),
    timestep: t.input('timestep', 'float32', [batch, timestepWidth]),
    context: t.input('context', 'float32', [batch, length, contextWidth]),
    pooled: t.input('pooled', 'float32', [batch, pooledWidth]),
    corner: t.input('corner', 'int64', [2]),
  };
}

/**
 * The velocity (noise - clean latent) that the model predicts: [batch, outChannels, height, width].
 * This is the whole model; {@link mmditxSegment} is a part of it.
 */
export function mmditx(config: TransformerConfig, weights: Weights, inputs: TransformerInputs): t.Tensor {
  let streams = embed(config, weights, inputs);
  for (let layer = 0; layer < config.depth; layer++) streams = jointBlock(config, weights, streams, layer);
  return velocity(config, weights, streams);
}

/** The stages of {@link mmditxSegment}: the embedding, the joint blocks, the output. */
export function stageCount({ depth }: TransformerConfig): number {
  return depth + 2;
}

/** The stage that computes a joint block. */
export function stageOf(layer: number): number {
  return layer + 1;
}

/**
 * The stages from `start` to before `end`. A segment that begins the network takes {@link TransformerInputs}; others
 * take what the one before gives: `image` [batch, rows, columns, hidden], `context` and `conditioning`. The last
 * segment gives `velocity`.
 * @param given inputs of the network that the same program computes
 */
export function mmditxSegment(
  config: TransformerConfig,
  weights: Weights,
  start: number,
  end: number,
  given: Partial<TransformerInputs> = {},
): t.Program {
  let streams = start === 0 ? embed(config, weights, { ...transformerInputs(config), ...given }) : streamInputs(config);
  for (let layer = Math.max(start - stageOf(0), 0); layer < Math.min(end - stageOf(0), config.depth); layer++) {
    streams = jointBlock(config, weights, streams, layer);
  }
  if (end === stageCount(config)) return { outputs: { velocity: velocity(config, weights, streams) } };
  const { image, context, conditioning } = streams;
  return { outputs: { image: t.reshape(image, [batch, rows, columns, config.hiddenSize]), context, conditioning } };
}

function streamInputs({ hiddenSize }: TransformerConfig): Streams {
  const image = t.input('image', 'float32', [batch, rows, columns, hiddenSize]);
  return {
    image: t.reshape(image, [batch, t.times(rows, columns), hiddenSize]),
    context: t.input('context', 'float32', [batch, length, hiddenSize]),
    conditioning: t.input('conditioning', 'float32', [batch, hiddenSize]),
  };
}

/** Latent, timestep and text to token streams. */
function embed(config: TransformerConfig, weights: Weights, inputs: TransformerInputs): Streams {
  const { hiddenSize, patchSize, inChannels, contextWidth, pooledWidth, timestepWidth, tableSize } = config;
  const patchWidth = inChannels * patchSize ** 2;
  const patches = t.linear(
    patchify(inputs.latent, config),
    weights('x_embedder.proj.weight', [hiddenSize, patchWidth]),
    weights('x_embedder.proj.bias', [hiddenSize]),
  );
  const table = weights('pos_embed', [tableSize, tableSize, hiddenSize]);
  const positions = t.reshape(t.crop(table, inputs.corner, [rows, columns]), [1, t.times(rows, columns), hiddenSize]);
  const timestep = embedder(within(weights, 't_embedder.mlp'), inputs.timestep, timestepWidth, hiddenSize);
  const pooled = embedder(within(weights, 'y_embedder.mlp'), inputs.pooled, pooledWidth, hiddenSize);
  return {
    image: t.add(patches, positions),
    context: dense(within(weights, 'context_embedder'), inputs.context, contextWidth, hiddenSize),
    conditioning: t.add(timestep, pooled),
  };
}

/** Image tokens to the velocity of their patches. */
function velocity(config: TransformerConfig, weights: Weights, { image, conditioning }: Streams): t.Tensor {
  const { hiddenSize, patchSize, outChannels } = config;
  const final = within(weights, 'final_layer');
  const [shift, scale] = modulation(final, conditioning, hiddenSize, 2) as [t.Tensor, t.Tensor];
  const normal = modulatedNorm(image, shift, scale);
  return unpatchify(dense(within(final, 'linear'), normal, hiddenSize, outChannels * patchSize ** 2), config);
}

/** One joint block (SD3 paper, figure 2b, with SD3.5's second attention of the image stream). */
function jointBlock(config: TransformerConfig, all: Weights, streams: Streams, layer: number): Streams {
  const weights = within(all, `joint_blocks.${layer}`);
  const { hiddenSize, heads } = config;
  const { image, context, conditioning } = streams;
  const imageWeights = within(weights, 'x_block');
  const contextWeights = within(weights, 'context_block');
  const dual = config.dualAttentionLayers.includes(layer);
  // The last block's context only serves as keys and values: its own result is never read.
  const last = layer === config.depth - 1;

  const mod = modulation(imageWeights, conditioning, hiddenSize, dual ? 9 : 6) as t.Tensor[];
  const contextMod = modulation(contextWeights, conditioning, hiddenSize, last ? 2 : 6) as t.Tensor[];

  const fromImage = queryKeyValue(config, within(imageWeights, 'attn'), modulatedNorm(image, mod[0]!, mod[1]!));
  const fromContext = queryKeyValue(
    config,
    within(contextWeights, 'attn'),
    modulatedNorm(context, contextMod[0]!, contextMod[1]!),
  );
  const [query, key, value] = fromContext.map((part, i) => t.concat([part, fromImage[i]!], 1)) as [
    t.Tensor,
    t.Tensor,
    t.Tensor,
  ];
  const attended = t.attention(query, key, value, { heads });
  const contextLength = t.size(context, 1);

  const attendedImage = t.slice(attended, 1, contextLength, t.size(image, 1));
  let x = residual(image, mod[2]!, projection(config, within(imageWeights, 'attn'), attendedImage));
  if (dual) {
    const second = within(imageWeights, 'attn2');
    const [query2, key2, value2] = queryKeyValue(config, second, modulatedNorm(image, mod[6]!, mod[7]!));
    x = residual(x, mod[8]!, projection(config, second, t.attention(query2, key2, value2, { heads })));
  }
  x = residual(x, mod[5]!, mlp(config, imageWeights, x, mod[3]!, mod[4]!));
  if (last) return { image: x, context, conditioning };

  const attendedContext = t.slice(attended, 1, 0, contextLength);
  let y = residual(context, contextMod[2]!, projection(config, within(contextWeights, 'attn'), attendedContext));
  y = residual(y, contextMod[5]!, mlp(config, contextWeights, y, contextMod[3]!, contextMod[4]!));
  return { image: x, context: y, conditioning };
}

/** Queries, keys and values of a stream; queries and keys normalised per head (SD3 paper, section 5.3.2). */
function queryKeyValue(
  { hiddenSize, headDim, qkNorm }: TransformerConfig,
  weights: Weights,
  x: t.Tensor,
): [t.Tensor, t.Tensor, t.Tensor] {
  const joined = dense(within(weights, 'qkv'), x, hiddenSize, 3 * hiddenSize);
  const [query, key, value] = t.split(joined, 3, 2) as [t.Tensor, t.Tensor, t.Tensor];
  if (!qkNorm) return [query, key, value];
  const normalize = (part: t.Tensor, name: string) => {
    const perHead = t.reshape(part, [...part.shape.slice(0, 2), hiddenSize / headDim, headDim]);
    return t.reshape(t.rmsNorm(perHead, weights(`${name}.weight`, [headDim]), QK_NORM_EPS), part.shape);
  };
  return [normalize(query, 'ln_q'), normalize(key, 'ln_k'), value];
}

function projection({ hiddenSize }: TransformerConfig, weights: Weights, x: t.Tensor): t.Tensor {
  return dense(within(weights, 'proj'), x, hiddenSize, hiddenSize);
}

function mlp(
  { hiddenSize, mlpHidden }: TransformerConfig,
  weights: Weights,
  x: t.Tensor,
  shift: t.Tensor,
  scale: t.Tensor,
): t.Tensor {
  const normal = modulatedNorm(x, shift, scale);
  const hidden = t.geluTanh(dense(within(weights, 'mlp.fc1'), normal, hiddenSize, mlpHidden));
  return dense(within(weights, 'mlp.fc2'), hidden, mlpHidden, hiddenSize);
}

/** x W^T + b */
function dense(weights: Weights, x: t.Tensor, width: number, out: number): t.Tensor {
  return t.linear(x, weights('weight', [out, width]), weights('bias', [out]));
}

/** Two linear layers with a SiLU between: how timestep and pooled text enter. */
function embedder(weights: Weights, x: t.Tensor, width: number, hidden: number): t.Tensor {
  return dense(within(weights, '2'), t.silu(dense(within(weights, '0'), x, width, hidden)), hidden, hidden);
}

/** `parts` vectors [batch, 1, hidden] from the conditioning: shifts, scales and gates (adaptive layer norm). */
function modulation(weights: Weights, conditioning: t.Tensor, hidden: number, parts: number): t.Tensor[] {
  const joined = dense(within(weights, 'adaLN_modulation.1'), t.silu(conditioning), hidden, parts * hidden);
  return t.split(t.reshape(joined, [t.size(joined, 0), 1, parts * hidden]), parts, 2);
}

/** Adaptive layer norm: the normalised tokens times 1 + scale, plus shift. */
function modulatedNorm(x: t.Tensor, shift: t.Tensor, scale: t.Tensor): t.Tensor {
  return t.layerNorm(x, TRANSFORMER_NORM_EPS, { scale: t.add(scale, 1), shift });
}

function residual(x: t.Tensor, gate: t.Tensor, change: t.Tensor): t.Tensor {
  return t.add(x, t.multiply(gate, change));
}

/** [B,C,rows*p,columns*p] to tokens [B,rows*columns,C*p*p]: the patch embedding's convolution as a linear layer. */
function patchify(latent: t.Tensor, { patchSize: p, inChannels }: TransformerConfig): t.Tensor {
  const pieces = t.reshape(latent, [batch, inChannels, rows, p, columns, p]);
  return t.reshape(t.transpose(pieces, [0, 2, 4, 1, 3, 5]), [batch, t.times(rows, columns), inChannels * p * p]);
}

/** Tokens with channels in the order (row in patch, column in patch, channel) to [B,C,height,width]. */
function unpatchify(tokens: t.Tensor, { patchSize: p, outChannels }: TransformerConfig): t.Tensor {
  const pieces = t.reshape(tokens, [batch, rows, columns, p, p, outChannels]);
  const image = t.transpose(pieces, [0, 5, 1, 3, 2, 4]);
  return t.reshape(image, [batch, outChannels, t.times(rows, p), t.times(columns, p)]);
}

/**
 * Sinusoids of timesteps (1000 * sigma): cosines, then sines, of `width / 2` frequencies from 1 down to 1/10000.
 * Every step is rounded to float32 as the references compute it (Stability-AI/sd3.5, `TimestepEmbedder`); in the
 * program itself a GPU would lose digits on angles of up to 1000 radians.
 *
 * @param timesteps one per batch item
 * @returns [batch, width]
 */
export function timestepEmbedding(timesteps: ArrayLike<number>, width: number): t.FloatTensor {
  const { fround } = Math;
  const half = width / 2;
  const data = new Float32Array(timesteps.length * width);
  const slope = fround(-Math.log(TIMESTEP_MAX_PERIOD));
  for (let item = 0; item < timesteps.length; item++) {
    for (let i = 0; i < half; i++) {
      const frequency = fround(Math.exp(fround(fround(slope * i) / half)));
      const angle = fround(fround(timesteps[item]!) * frequency);
      data[item * width + i] = Math.cos(angle);
      data[item * width + half + i] = Math.sin(angle);
    }
  }
  return t.floats([timesteps.length, width], data);
}

/** Corner of the centre crop of the position table for a latent of `gridRows` x `gridColumns` patches. */
export function centreCorner(tableSize: number, gridRows: number, gridColumns: number): t.TensorData {
  const start = (size: number) => BigInt(Math.floor((tableSize - size) / 2));
  return { dtype: 'int64', shape: [2], data: BigInt64Array.of(start(gridRows), start(gridColumns)) };
}
