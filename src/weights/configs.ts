/**
 * Configurations read off a checkpoint: counts from tensor names, widths from shapes, the rest from metadata or, where
 * it says nothing, from the released models. Whether the remaining tensors agree is checked against `expected.ts`.
 * Every function throws MmditxError `missing-part` or `bad-file` when the tensors do not make a network.
 */
import { MmditxError } from '../errors.ts';
import {
  CLIP_G_PAD_ID,
  type ClipConfig,
  DEFAULT_HEAD_DIM,
  LATENT_SCALE,
  LATENT_SHIFT,
  T5_DEFAULT_TOKENS,
  T5_MAX_DISTANCE,
  type T5Config,
  type TransformerConfig,
  VAE_GROUPS,
  type VaeConfig,
} from '../models/config.ts';
import type { TensorShapes } from './expected.ts';
import type { ClipHints, ConfigHints } from './metadata.ts';
import { quote } from './quote.ts';

/** More blocks or layers than any network of the family has: a damaged name must not ask for a million of them. */
const MAX_COUNT = 256;
/** The same for the VAE, whose tensors are levels times blocks; the released one has 4 levels of 2 blocks. */
const MAX_LEVELS = 8;
const MAX_LEVEL_BLOCKS = 32;

/** The tensors of one part, named without the file's prefix. */
export interface PartShapes {
  /** The file's name, for messages. */
  readonly file: string;
  readonly shapes: TensorShapes;
}

export function transformerConfig(part: PartShapes, hints: ConfigHints['transformer']): TransformerConfig {
  const [hiddenSize, inChannels, patchSize] = shapeOf(part, 'x_embedder.proj.weight', 4);
  const [, rows] = shapeOf(part, 'pos_embed', 3);
  const [, timestepWidth] = shapeOf(part, 't_embedder.mlp.0.weight', 2);
  const [, pooledWidth] = shapeOf(part, 'y_embedder.mlp.0.weight', 2);
  const [, contextWidth] = shapeOf(part, 'context_embedder.weight', 2);
  const [mlpHidden] = shapeOf(part, 'joint_blocks.0.x_block.mlp.fc1.weight', 2);
  const [outputs] = shapeOf(part, 'final_layer.linear.weight', 2);
  const depth = countIndices(part, /^joint_blocks\.(\d+)\./);
  const dualAttentionLayers = indices(part, /^joint_blocks\.(\d+)\.x_block\.attn2\./);
  const qkNorm = part.shapes.has('joint_blocks.0.x_block.attn.ln_q.weight');
  const headDim = qkNorm
    ? shapeOf(part, 'joint_blocks.0.x_block.attn.ln_q.weight', 1)[0]
    : hints?.heads
      ? hiddenSize / hints.heads
      : DEFAULT_HEAD_DIM;
  return {
    hiddenSize,
    depth,
    heads: whole(part, hiddenSize / headDim, `a width of ${hiddenSize} does not divide into heads of ${headDim}`),
    headDim,
    mlpHidden,
    patchSize,
    inChannels,
    outChannels: whole(
      part,
      outputs / patchSize ** 2,
      `${outputs} outputs per token are not patches of side ${patchSize}`,
    ),
    contextWidth,
    pooledWidth,
    timestepWidth,
    tableSize: whole(part, Math.sqrt(rows), `the ${rows} rows of its table of positions are not a square`),
    dualAttentionLayers,
    qkNorm,
  };
}

export function vaeConfig(part: PartShapes, hints: ConfigHints['vae']): VaeConfig {
  const [channels, imageChannels] = shapeOf(part, 'encoder.conv_in.weight', 4);
  const [, latentChannels] = shapeOf(part, 'decoder.conv_in.weight', 4);
  const multipliers = Array.from({ length: countIndices(part, /^encoder\.down\.(\d+)\./, MAX_LEVELS) }, (_, level) => {
    const [width] = shapeOf(part, `encoder.down.${level}.block.0.conv1.weight`, 4);
    return whole(part, width / channels, `level ${level} of its VAE has ${width} channels, no multiple of ${channels}`);
  });
  const groups = hints?.groups ?? VAE_GROUPS;
  whole(part, channels / groups, `the ${channels} channels of its VAE do not divide into ${groups} groups`);
  return {
    channels,
    multipliers,
    resBlocks: countIndices(part, /^encoder\.down\.0\.block\.(\d+)\./, MAX_LEVEL_BLOCKS),
    latentChannels,
    imageChannels,
    groups,
    latentScale: hints?.latentScale ?? LATENT_SCALE,
    latentShift: hints?.latentShift ?? LATENT_SHIFT,
  };
}

export function clipLConfig(part: PartShapes, hints: ConfigHints['clipL']): ClipConfig {
  const shared = clipConfig(part, hints);
  return {
    ...shared,
    activation: hints?.activation ?? 'quick_gelu',
    // Some files carry a projection, which Stable Diffusion 3 does not use.
    projection: false,
    pooledWidth: shared.width,
    padId: tokenId(part, hints?.padId ?? shared.eosId, shared.vocabSize),
  };
}

export function clipGConfig(part: PartShapes, hints: ConfigHints['clipG']): ClipConfig {
  const shared = clipConfig(part, hints);
  const projection = 'text_projection.weight';
  return {
    ...shared,
    activation: hints?.activation ?? 'gelu',
    projection: true,
    pooledWidth: part.shapes.has(projection) ? shapeOf(part, projection, 2)[0] : shared.width,
    padId: tokenId(part, hints?.padId ?? CLIP_G_PAD_ID, shared.vocabSize),
  };
}

function clipConfig(part: PartShapes, hints: ClipHints | undefined) {
  const [vocabSize, width] = shapeOf(part, 'text_model.embeddings.token_embedding.weight', 2);
  const [positions] = shapeOf(part, 'text_model.embeddings.position_embedding.weight', 2);
  const [mlpWidth] = shapeOf(part, 'text_model.encoder.layers.0.mlp.fc1.weight', 2);
  const headDim = hints?.heads ? width / hints.heads : DEFAULT_HEAD_DIM;
  whole(part, headDim, `a width of ${width} does not divide into ${hints?.heads} heads`);
  return {
    width,
    layers: countIndices(part, /^text_model\.encoder\.layers\.(\d+)\./),
    heads: whole(part, width / headDim, `a text encoder ${width} wide does not divide into heads of ${headDim}`),
    mlpWidth,
    vocabSize,
    positions,
    // The end token is the last of CLIP's vocabulary and the begin token stands before it.
    bosId: tokenId(part, hints?.bosId ?? vocabSize - 2, vocabSize),
    eosId: tokenId(part, hints?.eosId ?? vocabSize - 1, vocabSize),
  };
}

function tokenId({ file }: PartShapes, id: number, vocabSize: number): number {
  if (id >= 0 && id < vocabSize) return id;
  throw new MmditxError(
    'bad-file',
    `${file} fits no Stable Diffusion 3 model: a text encoder of ${vocabSize} tokens has none of the id ${id}; use an unchanged checkpoint.`,
  );
}

export function t5Config(part: PartShapes, hints: ConfigHints['t5']): T5Config {
  const [vocabSize, width] = shapeOf(part, 'shared.weight', 2);
  const attention = 'encoder.block.0.layer.0.SelfAttention';
  const [buckets, heads] = shapeOf(part, `${attention}.relative_attention_bias.weight`, 2);
  const [inner] = shapeOf(part, `${attention}.q.weight`, 2);
  const [mlpWidth] = shapeOf(part, 'encoder.block.0.layer.1.DenseReluDense.wi_0.weight', 2);
  return {
    width,
    layers: countIndices(part, /^encoder\.block\.(\d+)\./),
    heads,
    headDim: whole(part, inner / heads, `T5 queries ${inner} wide do not divide into ${heads} heads`),
    mlpWidth,
    vocabSize,
    tokens: hints?.tokens ?? T5_DEFAULT_TOKENS,
    buckets,
    maxDistance: hints?.maxDistance ?? T5_MAX_DISTANCE,
  };
}

type Shape<Rank extends number> = {
  1: readonly [number];
  2: readonly [number, number];
  3: readonly [number, number, number];
  4: readonly [number, number, number, number];
}[Rank & (1 | 2 | 3 | 4)];

function shapeOf<Rank extends 1 | 2 | 3 | 4>({ file, shapes }: PartShapes, name: string, rank: Rank): Shape<Rank> {
  const shape = shapes.get(name);
  if (!shape) {
    throw new MmditxError(
      'missing-part',
      `${file} lacks the tensor ${name}; the file is incomplete, download it again.`,
    );
  }
  if (shape.length !== rank || shape.includes(0)) {
    throw new MmditxError(
      'bad-file',
      `Tensor ${name} of ${file} has the shape ${quote(shape)}, not ${rank} dimensions; use an unchanged checkpoint.`,
    );
  }
  return shape as unknown as Shape<Rank>;
}

/** A positive integer, or an error that says why the file gives none. */
function whole({ file }: PartShapes, value: number, reason: string): number {
  if (Number.isSafeInteger(value) && value > 0) return value;
  throw new MmditxError(
    'bad-file',
    `${file} fits no Stable Diffusion 3 model: ${reason}; use an unchanged checkpoint.`,
  );
}

/** The numbers that stand at `pattern`'s group in tensor names, ascending. */
function indices({ shapes }: PartShapes, pattern: RegExp): number[] {
  const found = new Set<number>();
  for (const name of shapes.keys()) {
    const index = pattern.exec(name)?.[1];
    if (index !== undefined) found.add(Number(index));
  }
  return [...found].sort((a, b) => a - b);
}

/** How many there are, counted to the last one; a gap shows later as missing tensors. */
function countIndices(part: PartShapes, pattern: RegExp, most = MAX_COUNT): number {
  const counted = (indices(part, pattern).at(-1) ?? -1) + 1;
  return whole(part, counted > most ? Number.NaN : counted, `it numbers its blocks up to ${counted - 1}`);
}
