/** Initial values of weights, by the names and shapes the networks ask for. */

import type { TransformerConfig } from '../models/config.ts';
import { elementCount, type FloatTensor, floats } from '../tensor/data.ts';

/** Draws `count` standard normal numbers. */
export type NormalSource = (count: number) => Float32Array;

/**
 * The initial value of a weight: norms are the identity, biases zero, embeddings small, and everything else normal with
 * variance 1 / inputs, except that every block starts as the identity: the transformer's modulations and output are zero
 * (DiT, Peebles and Xie 2023), and so are the last layers of the autoencoder's residual branches (Goyal et al. 2017, for
 * their norms), which halves the steps it needs at the beginning.
 */
export function initialValue(name: string, shape: readonly number[], normal: NormalSource): FloatTensor {
  const data = new Float32Array(elementCount(shape));
  if (name.endsWith('.bias') || STARTS_AT_ZERO.test(name)) return floats(shape, data);
  if (shape.length === 1) return floats(shape, data.fill(1));
  const scale = /embedding|shared|relative_attention_bias/.test(name)
    ? EMBEDDING_SCALE
    : 1 / Math.sqrt(elementCount(shape.slice(1)));
  const values = normal(data.length);
  for (let i = 0; i < data.length; i++) data[i] = values[i]! * scale;
  return floats(shape, data);
}
const STARTS_AT_ZERO = /adaLN_modulation|final_layer\.linear|\.conv2\.weight$|\.proj_out\.weight$/;
/** Standard deviation of initial embeddings, as in CLIP (Radford et al. 2021). */
const EMBEDDING_SCALE = 0.02;

export interface PositionTableOptions {
  /** Side of the grid of patches, in the middle of the table, whose positions span `span`. */
  grid: number;
  /** Length of the interval of positions of that grid: 16 in Stable Diffusion 3 for 64 patches. */
  span: number;
}

/**
 * The table of positions: sines and cosines of column and row (SD3 paper, section 5.3.2; kohya's
 * `get_scaled_2d_sincos_pos_embed`). Entry p of an axis lies at (p - (side - grid) / 2) * span / grid, so that the
 * grid in the middle starts at 0. The first half of the channels encodes the column, the second the row; each half
 * holds sines, then cosines, with frequencies 10000^(-j / quarter).
 * @returns [1, side * side, hiddenSize]
 */
export function positionTable(
  { tableSize: side, hiddenSize }: Pick<TransformerConfig, 'tableSize' | 'hiddenSize'>,
  { grid, span }: PositionTableOptions,
): FloatTensor {
  const quarter = hiddenSize / 4;
  const data = new Float32Array(side * side * hiddenSize);
  for (let row = 0; row < side; row++) {
    for (let column = 0; column < side; column++) {
      for (const [half, index] of [column, row].entries()) {
        const position = ((index - (side - grid) / 2) * span) / grid;
        const start = (row * side + column) * hiddenSize + half * 2 * quarter;
        for (let j = 0; j < quarter; j++) {
          const angle = position * 10_000 ** (-j / quarter);
          data[start + j] = Math.sin(angle);
          data[start + quarter + j] = Math.cos(angle);
        }
      }
    }
  }
  return floats([1, side * side, hiddenSize], data);
}
