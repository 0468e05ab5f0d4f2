/**
 * Weights as integers, in the layouts that ONNX Runtime multiplies with and this package writes.
 *
 * | precision | tensor | companion |
 * |---|---|---|
 * | int8 | `name` int8 [in, out] | `name.int8_scale` float32 [out]: the weight is value * scale of its column |
 * | int4 | `name` uint8 [out, blocks, 16] | `name.int4_scale` float32 [out, blocks]: two values of 4 bits a byte, the first in the low bits; the weight is (value - 8) * scale of its block of 32 |
 *
 * int8 is symmetric per output channel (Jacob et al. 2018); int4 has the blocks of ONNX Runtime's `MatMulNBits`.
 */

import { type FloatTensor, INT4_BLOCK, type QuantizedPrecision, type TensorData, type TypedArray } from '../tensor/index.ts';
import type { WeightTensor } from './stored.ts';

const companions: Readonly<Record<QuantizedPrecision, string>> = { int8: '.int8_scale', int4: '.int4_scale' };

/** Joins the tensors of quantised weights with the scales beside them; others stay as they are. */
export function quantizedWeights(weights: ReadonlyMap<string, WeightTensor>): Map<string, WeightTensor> {
  const joined = new Map(weights);
  for (const [name, weight] of weights) {
    for (const precision of Object.keys(companions) as QuantizedPrecision[]) {
      const companion = `${name}${companions[precision]}`;
      const scales = weights.get(companion)?.spans[0];
      if (!scales) continue;
      joined.delete(companion);
      joined.set(name, { ...weight, shape: originalShape(precision, weight.shape), quantized: { precision, scales } });
    }
  }
  return joined;
}

/** The weight's shape [out, in] from its stored one; a shape that fits no precision stays and is refused later. */
function originalShape(precision: QuantizedPrecision, shape: readonly number[]): readonly number[] {
  if (precision === 'int8' && shape.length === 2) return [shape[1]!, shape[0]!];
  if (precision === 'int4' && shape.length === 3) return [shape[0]!, shape[1]! * INT4_BLOCK];
  return shape;
}

/** The two tensors that a weight [out, in] is written as in a precision, by their suffixes to its name. */
export function quantizedPlan(
  [out, width]: readonly [number, number],
  precision: QuantizedPrecision,
): ReadonlyMap<string, Pick<TensorData, 'dtype' | 'shape'>> {
  const blocks = width / INT4_BLOCK;
  return precision === 'int8'
    ? new Map([
        ['', { dtype: 'int8', shape: [width, out] }],
        [companions.int8, { dtype: 'float32', shape: [out] }],
      ])
    : new Map([
        ['', { dtype: 'uint8', shape: [out, blocks, INT4_BLOCK / 2] }],
        [companions.int4, { dtype: 'float32', shape: [out, blocks] }],
      ]);
}

/** The values of {@link quantizedPlan}'s tensors. */
export function quantize(weight: FloatTensor, precision: QuantizedPrecision): [TypedArray, TypedArray] {
  return precision === 'int8' ? quantizeInt8(weight) : quantizeInt4(weight);
}

/** Largest magnitude of an int8 value: symmetric, so that negating a weight negates its integers. */
const INT8_LARGEST = 127;

/** [out, in] to int8 [in, out] and a scale for each output. */
function quantizeInt8({ shape, data }: FloatTensor): [Int8Array, Float32Array] {
  const [rows, columns] = shape as [number, number];
  const scales = new Float32Array(rows);
  const values = new Int8Array(rows * columns);
  for (let row = 0; row < rows; row++) {
    let peak = 0;
    for (let i = row * columns; i < (row + 1) * columns; i++) peak = Math.max(peak, Math.abs(data[i]!));
    scales[row] = peak / INT8_LARGEST;
  }
  // Squares of values, so that neither side of the transposition leaves the processor's caches.
  for (let top = 0; top < rows; top += TRANSPOSE_TILE) {
    for (let left = 0; left < columns; left += TRANSPOSE_TILE) {
      const bottom = Math.min(top + TRANSPOSE_TILE, rows);
      const right = Math.min(left + TRANSPOSE_TILE, columns);
      for (let row = top; row < bottom; row++) {
        const factor = scales[row]! > 0 ? 1 / scales[row]! : 0;
        for (let column = left; column < right; column++) {
          values[column * rows + row] = Math.round(data[row * columns + column]! * factor);
        }
      }
    }
  }
  return [values, scales];
}
const TRANSPOSE_TILE = 64;

/** Middle of the 16 values of int4, which stands for zero. */
const INT4_ZERO = 8;

/**
 * [out, in] to packed int4 [out, blocks, 16] and a scale for each block. The value of largest magnitude becomes -8,
 * as in GGUF's Q4_0: it uses all 16 values.
 */
function quantizeInt4({ shape, data }: FloatTensor): [Uint8Array, Float32Array] {
  const [rows, columns] = shape as [number, number];
  if (columns % INT4_BLOCK !== 0) throw new RangeError(`int4 needs rows of a multiple of ${INT4_BLOCK} values.`);
  const blocks = columns / INT4_BLOCK;
  const scales = new Float32Array(rows * blocks);
  const values = new Uint8Array((rows * columns) / 2);
  for (let block = 0; block < scales.length; block++) {
    const start = block * INT4_BLOCK;
    let peak = 0;
    for (let i = start; i < start + INT4_BLOCK; i++) if (Math.abs(data[i]!) > Math.abs(peak)) peak = data[i]!;
    const scale = peak / -INT4_ZERO;
    const factor = scale === 0 ? 0 : 1 / scale;
    const nibble = (i: number) =>
      Math.min(Math.max(Math.round(data[i]! * factor) + INT4_ZERO, 0), 2 * INT4_ZERO - 1);
    scales[block] = scale;
    for (let i = 0; i < INT4_BLOCK; i += 2) {
      values[(start + i) / 2] = nibble(start + i) | (nibble(start + i + 1) << 4);
    }
  }
  return [values, scales];
}
