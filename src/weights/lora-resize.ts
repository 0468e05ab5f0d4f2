/**
 * LoRAs of lower rank: of each change `up @ down`, what its largest singular values hold, which is the nearest matrix of
 * that rank (Eckart and Young 1936).
 */

import { Matrix, QrDecomposition, SingularValueDecomposition } from 'ml-matrix';
import { MmditxError } from '../errors.ts';
import { type FloatTensor, floats } from '../tensor/data.ts';
import type { LoraLayer } from './lora-write.ts';

/** Either `rank` or `keep`. */
export interface ResizeOptions {
  /** Ranks to keep in every layer, at least 1; layers of fewer stay as they are. */
  readonly rank?: number | undefined;
  /** Share of each change's Frobenius norm to keep at least, above 0 to 1: as few ranks as that takes. */
  readonly keep?: number | undefined;
  /** Most ranks that `keep` may take (default all). */
  readonly maxRank?: number | undefined;
}

/** What became of a layer. */
export interface LayerResize {
  readonly part: LoraLayer['part'];
  readonly weight: string;
  /** Ranks before and after. */
  readonly from: number;
  readonly to: number;
  /** Share of the change's Frobenius norm that is left, 0 to 1. */
  readonly kept: number;
}

export interface ResizedLora {
  readonly layers: LoraLayer[];
  readonly report: LayerResize[];
}

/**
 * Lowers the ranks of a LoRA. The factor alpha / rank of each layer stays, so that alpha shrinks with the rank.
 * @param onLayer called after each layer
 * @throws MmditxError `bad-option` for options out of range
 */
export function resizeLora(
  layers: readonly LoraLayer[],
  options: ResizeOptions,
  onLayer?: (done: number, total: number) => void,
): ResizedLora {
  requireOptions(options);
  const resized = layers.map((layer, i) => {
    const result = resizeLayer(layer, options);
    onLayer?.(i + 1, layers.length);
    return result;
  });
  return { layers: resized.map(({ layer }) => layer), report: resized.map(({ report }) => report) };
}

function requireOptions({ rank, keep, maxRank }: ResizeOptions): void {
  if ((rank === undefined) === (keep === undefined)) {
    throw new MmditxError('bad-option', 'Give either the rank to resize to or the share of the change to keep.');
  }
  if (maxRank !== undefined && keep === undefined) {
    throw new MmditxError('bad-option', 'The largest rank goes with the share to keep; give the rank alone or both.');
  }
  for (const [name, value] of Object.entries({ rank, 'largest rank': maxRank })) {
    if (value !== undefined && !(Number.isSafeInteger(value) && value >= 1)) {
      throw new MmditxError('bad-option', `The ${name} is ${value}; give a whole number of 1 or more.`);
    }
  }
  if (keep !== undefined && !(keep > 0 && keep <= 1)) {
    throw new MmditxError('bad-option', `The share to keep is ${keep}; give a number above 0, up to 1.`);
  }
}

function resizeLayer(
  layer: LoraLayer,
  { rank, keep = 1, maxRank }: ResizeOptions,
): { layer: LoraLayer; report: LayerResize } {
  const { part, weight, down, up, alpha } = layer;
  const from = down.shape[0]!;
  const most = Math.min(rank ?? maxRank ?? from, from);
  const report = (to: number, kept: number) => ({ part, weight, from, to, kept });
  if (rank !== undefined && most === from) return { layer, report: report(from, 1) };

  const { left, values, right } = decompose(up, down);
  const energy = values.map((value) => value ** 2);
  const total = energy.reduce((sum, value) => sum + value, 0);
  let to = 0;
  let held = 0;
  const enough = rank === undefined ? keep ** 2 * total : Number.POSITIVE_INFINITY;
  // A change of nothing keeps one rank, as matrices must have one.
  while (to < Math.min(most, values.length) && (to === 0 || held < enough)) held += energy[to++]!;
  return {
    layer: {
      part,
      weight,
      up: scaledColumns(left, values, to),
      down: transposed(scaledColumns(right, values, to)),
      alpha: (alpha / from) * to,
    },
    report: report(to, total === 0 ? 1 : Math.min(Math.sqrt(held / total), 1)),
  };
}

/**
 * The singular value decomposition of `up @ down`, largest values first, without that product: with up = Qu Ru and
 * down^T = Qd Rd, it is Qu (Ru Rd^T) Qd^T, and the matrix in the middle is no larger than the rank.
 */
function decompose(up: FloatTensor, down: FloatTensor): { left: Matrix; values: number[]; right: Matrix } {
  const tall = orthogonal(matrix(up));
  const wide = orthogonal(matrix(down).transpose());
  const middle = tall.triangle.mmul(wide.triangle.transpose());
  // Near one, where the iteration's thresholds are made for.
  const peak = Math.max(middle.max(), -middle.min()) || 1;
  const svd = new SingularValueDecomposition(middle.div(peak), { autoTranspose: true });
  return {
    left: tall.apply(svd.leftSingularVectors),
    values: Array.from(svd.diagonal, (value) => value * peak),
    right: wide.apply(svd.rightSingularVectors),
  };
}

/** A matrix as Q R; one that is no taller than wide is R itself. */
function orthogonal(value: Matrix): { triangle: Matrix; apply: (to: Matrix) => Matrix } {
  if (value.rows <= value.columns) return { triangle: value, apply: (to) => to };
  const qr = new QrDecomposition(value);
  const q = qr.orthogonalMatrix;
  return { triangle: qr.upperTriangularMatrix, apply: (to) => q.mmul(to) };
}

function matrix({ shape, data }: FloatTensor): Matrix {
  return Matrix.from1DArray(shape[0]!, shape[1]!, data);
}

/** The first columns, each times the root of its singular value, so that both matrices are of one size. */
function scaledColumns(vectors: Matrix, values: readonly number[], count: number): FloatTensor {
  const data = new Float32Array(vectors.rows * count);
  for (let row = 0; row < vectors.rows; row++) {
    for (let i = 0; i < count; i++) data[row * count + i] = vectors.get(row, i) * Math.sqrt(values[i]!);
  }
  return floats([vectors.rows, count], data);
}

function transposed({ shape, data }: FloatTensor): FloatTensor {
  const [rows, columns] = shape as [number, number];
  const turned = new Float32Array(data.length);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) turned[column * rows + row] = data[row * columns + column]!;
  }
  return floats([columns, rows], turned);
}
