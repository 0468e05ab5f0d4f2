/** The small model's networks: the architecture of Stable Diffusion 3.5 Medium at about a two-hundredth of its size. */

import {
  CLIP_G,
  CLIP_L,
  type ClipConfig,
  SD3_VAE,
  SD35_MEDIUM_TRANSFORMER,
  T5_XXL,
  type T5Config,
  type TransformerConfig,
  type VaeConfig,
} from '../../src/models/config.ts';

/**
 * Eight groups keep the four channels per group of the original: with 32, each of the 32 channels at full resolution
 * would be normalised by itself, and the mean colour of a picture with it.
 */
export const VAE: VaeConfig = { ...SD3_VAE, channels: 32, multipliers: [1, 1, 2, 4], resBlocks: 1, groups: 8 };

/** Captions have at most eleven words, nearly all of them one token. */
const TOKENS = 16;
const CLIP_L_WIDTH = 64;
const CLIP_G_WIDTH = 128;

export function clipL(vocabSize: number): ClipConfig {
  return {
    ...CLIP_L,
    width: CLIP_L_WIDTH,
    pooledWidth: CLIP_L_WIDTH,
    layers: 2,
    heads: 1,
    mlpWidth: 4 * CLIP_L_WIDTH,
    vocabSize,
    positions: TOKENS,
    bosId: vocabSize - 2,
    eosId: vocabSize - 1,
    padId: vocabSize - 1,
  };
}

export function clipG(vocabSize: number): ClipConfig {
  return {
    ...CLIP_G,
    width: CLIP_G_WIDTH,
    pooledWidth: CLIP_G_WIDTH,
    layers: 3,
    heads: 2,
    mlpWidth: 4 * CLIP_G_WIDTH,
    vocabSize,
    positions: TOKENS,
    bosId: vocabSize - 2,
    eosId: vocabSize - 1,
  };
}

export function t5(vocabSize: number): T5Config {
  const width = CLIP_L_WIDTH + CLIP_G_WIDTH;
  return { ...T5_XXL, width, layers: 2, heads: 3, headDim: 64, mlpWidth: 2 * width, vocabSize, tokens: TOKENS };
}

export const TRANSFORMER: TransformerConfig = {
  ...SD35_MEDIUM_TRANSFORMER,
  hiddenSize: 256,
  depth: 6,
  heads: 4,
  mlpHidden: 1024,
  contextWidth: CLIP_L_WIDTH + CLIP_G_WIDTH,
  pooledWidth: CLIP_L_WIDTH + CLIP_G_WIDTH,
  tableSize: 24,
  dualAttentionLayers: [0, 1, 2],
};
