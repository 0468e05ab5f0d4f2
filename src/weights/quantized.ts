/**
 * Weights as integers, in the layouts that ONNX Runtime multiplies with and this package writes.
 *
 * | precision | tensor | companion |
 * |---|---|---|
 * | int8 | `name` int8 [in, out], or [parts, in, out / parts] | `name.int8_scale` float32 [out]: the weight is value * scale of its column |
 * | int4 | `name` uint8 [out, blocks, 16] | `name.int4_scale` float32 [out, blocks]: two values of 4 bits a byte, the first in the low bits; the weight is (value - 8) * scale of its block of 32 |
 *
 * int8 is symmetric per output channel (Jacob et al. 2018); int4 has the blocks of ONNX Runtime's `MatMulNBits`.
 * Queries, keys and values that one weight makes are parts of their own: products with them need no taking apart. And
 * parts are narrow enough to be multiplied with where they are mapped, as fast as weights that were packed first.
 */

import {
  bytesPerElement,
  elementCount,
  type FloatTensor,
  INT4_BLOCK,
  type QuantizedPrecision,
  type TensorData,
  type TypedArray,
} from '../tensor/index.ts';
import { equalParts, type Span, type WeightTensor } from './stored.ts';

const companions: Readonly<Record<QuantizedPrecision, string>> = { int8: '.int8_scale', int4: '.int4_scale' };

/** Weights [out, in] whose outputs are parts of equal size that are used apart. */
const JOINED = /(?:^|\.)qkv\.weight$/;
const JOINED_PARTS = 3;
/**
 * Widest part of an int8 weight. Measured with ONNX Runtime 1.30 on AVX-512 VNNI, 1024 rows of 1536: unpacked weights
 * reach 1290 GOPS at 1536 columns and 650 at 6144, packed ones 1300 and 1040.
 */
const WIDEST_PART = 2048;
/** Most parts of a weight: below it for every released model; a weight that would need more is one part. */
const MOST_PARTS = 64;

function joinedParts(name: string): number {
  return JOINED.test(name) ? JOINED_PARTS : 1;
}

/** Layers that run on one row for each picture: packed or not makes no difference to them. */
const SINGLE_ROW = /(?:^|\.)adaLN_modulation\.1\.weight$/;

/** Parts that an int8 weight is written in. */
function int8Parts(name: string, out: number): number {
  const joined = joinedParts(name);
  if (SINGLE_ROW.test(name)) return joined;
  for (let parts = joined; parts <= MOST_PARTS; parts += joined) {
    if (out % parts === 0 && out / parts <= WIDEST_PART) return parts;
  }
  return joined;
}

/** Joins the tensors of quantised weights with the scales beside them; others stay as they are. */
export function quantizedWeights(weights: ReadonlyMap<string, WeightTensor>): Map<string, WeightTensor> {
  const joined = new Map(weights);
  for (const [name, weight] of weights) {
    for (const precision of Object.keys(companions) as QuantizedPrecision[]) {
      const companion = `${name}${companions[precision]}`;
      const scales = weights.get(companion)?.spans[0];
      const quantized = scales && quantizedWeight(name, weight, precision, scales);
      if (!quantized) continue;
      joined.delete(companion);
      joined.set(name, quantized);
    }
  }
  return joined;
}

/** A weight from its tensors; undefined where their types and shapes do not belong together. */
function quantizedWeight(
  name: string,
  { spans: [values], ...weight }: WeightTensor,
  precision: QuantizedPrecision,
  scales: Span,
): WeightTensor | undefined {
  if (!values || scales.encoding !== 'float32') return undefined;
  const sizes = values.shape;
  let shape: readonly [number, number];
  let parts: number;
  if (precision === 'int8') {
    if (values.encoding !== 'int8' || sizes.length < 2 || sizes.length > 3) return undefined;
    parts = sizes.length === 3 ? sizes[0]! : 1;
    if (parts < 1 || parts > MOST_PARTS) return undefined;
    shape = [parts * sizes.at(-1)!, sizes.at(-2)!];
    if (scales.shape.join() !== String(shape[0])) return undefined;
  } else {
    if (values.encoding !== 'uint8' || sizes.length !== 3 || sizes[2] !== INT4_BLOCK / 2) return undefined;
    shape = [sizes[0]!, sizes[1]! * INT4_BLOCK];
    parts = shape[0] % joinedParts(name) === 0 ? joinedParts(name) : 1;
    if (scales.shape.join() !== sizes.slice(0, 2).join()) return undefined;
  }
  const [out, width] = shape;
  const partShape = precision === 'int8' ? [width, out / parts] : [out / parts, ...sizes.slice(1)];
  const scaleShape = [out / parts, ...scales.shape.slice(1)];
  return {
    ...weight,
    shape,
    spans: equalParts(values, partShape, parts),
    quantized: { precision, scales: equalParts(scales, scaleShape, parts) },
  };
}

type TensorPlan = Pick<TensorData, 'dtype' | 'shape'>;

/**
 * The two tensors that a weight [out, in] is written as in a precision, by name.
 * @param parts of int8 (default: those that {@link quantize} makes)
 */
export function quantizedPlan(
  name: string,
  [out, width]: readonly [number, number],
  precision: QuantizedPrecision,
  parts = int8Parts(name, out),
): ReadonlyMap<string, TensorPlan> {
  const blocks = width / INT4_BLOCK;
  const [values, scales]: [TensorPlan, readonly number[]] =
    precision === 'int8'
      ? [{ dtype: 'int8', shape: parts > 1 ? [parts, width, out / parts] : [width, out] }, [out]]
      : [{ dtype: 'uint8', shape: [out, blocks, INT4_BLOCK / 2] }, [out, blocks]];
  return new Map([
    [name, values],
    [`${name}${companions[precision]}`, { dtype: 'float32', shape: scales }],
  ]);
}

/** The values of {@link quantizedPlan}'s tensors. */
export function quantize(
  name: string,
  weight: FloatTensor,
  precision: QuantizedPrecision,
): readonly [values: TypedArray, scales: Float32Array] {
  return precision === 'int8' ? quantizeInt8(weight, int8Parts(name, weight.shape[0]!)) : quantizeInt4(weight);
}

/** Largest magnitude of an int8 value: symmetric, so that negating a weight negates its integers. */
const INT8_LARGEST = 127;
const TRANSPOSE_TILE = 64;

/** [out, in] to int8 [parts, in, out / parts] and a scale for each output. */
function quantizeInt8({ shape, data }: FloatTensor, parts: number): [Int8Array, Float32Array] {
  const [rows, columns] = shape as [number, number];
  const scales = new Float32Array(rows);
  const values = new Int8Array(rows * columns);
  for (let row = 0; row < rows; row++) {
    let peak = 0;
    for (let i = row * columns; i < (row + 1) * columns; i++) peak = Math.max(peak, Math.abs(data[i]!));
    scales[row] = peak / INT8_LARGEST;
  }
  const partRows = rows / parts;
  for (let first = 0; first < rows; first += partRows) {
    // Squares of values, so that neither side of the transposition leaves the processor's caches.
    for (let top = 0; top < partRows; top += TRANSPOSE_TILE) {
      for (let left = 0; left < columns; left += TRANSPOSE_TILE) {
        const bottom = Math.min(top + TRANSPOSE_TILE, partRows);
        const right = Math.min(left + TRANSPOSE_TILE, columns);
        for (let row = top; row < bottom; row++) {
          const scale = scales[first + row]!;
          const factor = scale > 0 ? 1 / scale : 0;
          const source = (first + row) * columns;
          const target = first * columns + row;
          for (let column = left; column < right; column++) {
            values[target + column * partRows] = Math.round(data[source + column]! * factor);
          }
        }
      }
    }
  }
  return [values, scales];
}

/** Middle of the 16 values of int4, which stands for zero. */
const INT4_ZERO = 8;

/**
 * [out, in] to packed int4 [out, blocks, 16] and a scale for each block. The value of largest magnitude becomes -8,
 * as in GGUF's Q4_0: it uses all 16 values.
 */
function quantizeInt4({ shape, data }: FloatTensor): [Uint8Array, Float32Array] {
  const [rows, columns] = shape as [number, number];
  if (columns % INT4_BLOCK !== 0) throw new RangeError(`int4 needs rows of a multiple of ${INT4_BLOCK} values.`);
  const scales = new Float32Array((rows * columns) / INT4_BLOCK);
  const values = new Uint8Array((rows * columns) / 2);
  for (let block = 0; block < scales.length; block++) {
    const start = block * INT4_BLOCK;
    let peak = 0;
    for (let i = start; i < start + INT4_BLOCK; i++) {
      // What is not a number stays the peak, so that the scale tells of it.
      if (!(Math.abs(data[i]!) <= Math.abs(peak) || Number.isNaN(peak))) peak = data[i]!;
    }
    const scale = peak / -INT4_ZERO;
    const factor = scale === 0 ? 0 : 1 / scale;
    const nibble = (i: number) => Math.min(Math.max(Math.round(data[i]! * factor) + INT4_ZERO, 0), 2 * INT4_ZERO - 1);
    scales[block] = scale;
    for (let i = 0; i < INT4_BLOCK; i += 2) {
      values[(start + i) / 2] = nibble(start + i) | (nibble(start + i + 1) << 4);
    }
  }
  return [values, scales];
}

/** The values of a quantised weight [out, in] in floating point, from the bytes of its spans. */
export function dequantized(
  { shape, spans, quantized }: WeightTensor,
  values: readonly TypedArray[],
  scales: readonly TypedArray[],
): Float32Array {
  const [, width] = shape as [number, number];
  const data = new Float32Array(elementCount(shape));
  let end = 0;
  for (const [i, { byteLength, encoding }] of spans.entries()) {
    const integers = values[i]!;
    const factors = scales[i]! as Float32Array;
    if (quantized?.precision === 'int8') {
      const out = byteLength / bytesPerElement[encoding as 'int8'] / width;
      for (let row = 0; row < out; row++) {
        for (let column = 0; column < width; column++) {
          data[end++] = (integers[column * out + row] as number) * factors[row]!;
        }
      }
    } else {
      for (let pair = 0; pair < integers.length; pair++) {
        const factor = factors[Math.floor((2 * pair) / INT4_BLOCK)]!;
        data[end++] = (((integers[pair] as number) & 15) - INT4_ZERO) * factor;
        data[end++] = (((integers[pair] as number) >> 4) - INT4_ZERO) * factor;
      }
    }
  }
  return data;
}
