/**
 * Weights stored as integers, and products with them. They cannot be trained: gradients flow through a product to what is
 * multiplied, with the weight in floating point.
 */

import { sameShape } from './dimension.ts';
import type { OnnxWriter } from './onnx.ts';
import { misfit, type Operation, record, type Tensor } from './tensor.ts';

/** Values of int4 that share a scale (the block size of ONNX Runtime's `MatMulNBits`). */
export const INT4_BLOCK = 32;

const DEQUANTIZE_INT8: Operation = {
  name: 'DequantizeInt8',
  gradient: () => [undefined, undefined],
  write: (_output, [values, scales], writer) =>
    writer.node('Transpose', [writer.node('DequantizeLinear', [values!, scales!], { axis: 1 })], { perm: [1, 0] }),
};

const DEQUANTIZE_INT4: Operation = {
  name: 'DequantizeInt4',
  gradient: () => [undefined, undefined],
  write: (output, [values, scales], writer) => writeInt4(output.inputs[0]!, values!, scales!, writer),
};

/** The weight [out, in] of blocks of 4 bits, in elementary nodes. */
function writeInt4(stored: Tensor, values: string, scales: string, writer: OnnxWriter): string {
  const [rows, blockCount] = stored.shape as [number, number];
  const low = writer.node('BitwiseAnd', [values, writer.bytes([15])]);
  const high = writer.node('BitShift', [values, writer.bytes([4])], { direction: 'RIGHT' });
  const last = writer.integers([-1]);
  const pairs = [low, high].map((nibbles) => writer.node('Unsqueeze', [nibbles, last]));
  const both = writer.node('Cast', [writer.node('Concat', pairs, { axis: -1 })], { to: writer.elementType('float32') });
  const blocks = writer.node('Reshape', [both, writer.integers([rows, blockCount, INT4_BLOCK])]);
  const scaled = writer.node('Mul', [
    writer.node('Sub', [blocks, writer.floats([8])]),
    writer.node('Unsqueeze', [scales, last]),
  ]);
  return writer.node('Reshape', [scaled, writer.integers([rows, blockCount * INT4_BLOCK])]);
}

/** How a weight is stored as integers. */
export type QuantizedPrecision = 'int8' | 'int4';

/**
 * A weight [out, in] from its integers.
 * @param values int8: int8 [in, out]; int4: uint8 [out, blocks, 16], two values a byte, the first in the low bits
 * @param scales float32; int8: [out]; int4: [out, blocks], for values from which 8 is subtracted
 */
export function dequantize(precision: QuantizedPrecision, values: Tensor, scales: Tensor): Tensor {
  const [first, second] = values.shape as [number, number];
  if (precision === 'int8') {
    if (values.dtype !== 'int8' || values.shape.length !== 2 || !sameShape(scales.shape, [second])) {
      misfit('Dequantize', 'int8 needs values [in, out] and a scale for each output', values, scales);
    }
    return record(DEQUANTIZE_INT8, [values, scales], [second, first], { dtype: 'float32' });
  }
  if (values.dtype !== 'uint8' || values.shape.length !== 3 || !sameShape(scales.shape, [first, second])) {
    misfit('Dequantize', 'int4 needs values [out, blocks, 16] and a scale for each block', values, scales);
  }
  return record(DEQUANTIZE_INT4, [values, scales], [first, second * INT4_BLOCK], { dtype: 'float32' });
}

export function isDequantized(weight: Tensor): boolean {
  return weight.operation === DEQUANTIZE_INT8 || weight.operation === DEQUANTIZE_INT4;
}

/** x W^T for a matrix x [rows, in] and a {@link dequantize}d weight [out, in]; `exact` leaves x in floating point. */
export function quantizedProduct(x: Tensor, weight: Tensor, exact = false): Tensor {
  const operation = weight.operation === DEQUANTIZE_INT8 ? INT8_PRODUCT : INT4_PRODUCT;
  return record(operation, [x, ...weight.inputs], [x.shape[0]!, weight.shape[0]!], {
    attributes: { exact: exact ? 1 : 0 },
  });
}

/** Largest magnitude of a quantised activation, as integers of 8 bits around {@link ACTIVATION_ZERO}. */
const ACTIVATION_LARGEST = 127;
/** Zero of activations. They are unsigned: processors multiply unsigned by signed bytes (VNNI), both signed far slower. */
const ACTIVATION_ZERO = 128;
/** Keeps the scale of a row of zeros from being 0. */
const SMALLEST_PEAK = 1e-30;

/**
 * The product in 8-bit integers: each row of x is quantised by its own largest magnitude, each output of W by its own
 * scale (the row-wise and column-wise scheme of LLM.int8(), Dettmers et al. 2022, without its outliers).
 */
const INT8_PRODUCT: Operation = {
  name: 'Int8Product',
  gradient: inputGradient,
  write(output, [x, values, scales], writer) {
    if (!writer.cpu) {
      const weight = writer.node('DequantizeLinear', [values!, scales!], { axis: 1 });
      return writer.node('MatMul', [x!, weight]);
    }
    let sum: string | undefined;
    let rest = x!;
    for (let term = 0; term < (output.attributes.exact ? EXACT_TERMS : 1); term++) {
      if (sum !== undefined) rest = remainder(rest, writer);
      const { scale, integers } = quantizedRows(rest, writer);
      const operands = [integers, values!, writer.floats([1]), scales!, writer.bytes([ACTIVATION_ZERO])];
      const product = writer.node('MatMulIntegerToFloat', operands, {}, 'com.microsoft');
      const scaled = writer.node('Mul', [product, writer.node('Unsqueeze', [scale, writer.integers([1])])]);
      sum = sum === undefined ? scaled : writer.node('Add', [sum, scaled]);
    }
    return sum!;
  },
};

/**
 * Terms of 8 bits that x is taken apart into for an exact product: together they have the 24 bits of a float32's
 * fraction. Three integer products are still three times as fast as dequantising the weight and one in float32.
 */
const EXACT_TERMS = 3;

/** What a row's quantisation leaves of it. */
function remainder(x: string, writer: OnnxWriter): string {
  const { scale, integers, zeros } = quantizedRows(x, writer);
  return writer.node('Sub', [x, writer.node('DequantizeLinear', [integers, scale, zeros], { axis: 0 })]);
}

/** Each row as unsigned bytes and its scale [rows]. */
function quantizedRows(x: string, writer: OnnxWriter): { scale: string; integers: string; zeros: string } {
  const columns = writer.integers([1]);
  const highest = writer.node('ReduceMax', [x, columns], { keepdims: 0 });
  const lowest = writer.node('ReduceMin', [x, columns], { keepdims: 0 });
  const peak = writer.node('Max', [highest, writer.node('Neg', [lowest]), writer.floats([SMALLEST_PEAK])]);
  const scale = writer.node('Mul', [peak, writer.floats([1 / ACTIVATION_LARGEST])]);
  const zeros = writer.node('Expand', [writer.bytes([ACTIVATION_ZERO]), writer.node('Shape', [scale])]);
  return { scale, zeros, integers: writer.node('QuantizeLinear', [x, scale, zeros], { axis: 0 }) };
}

/**
 * The upstream gradient times the weight, in floating point: rounding the activations of the product changes its value,
 * not its slope.
 */
function inputGradient(output: Tensor, upstream: Tensor): readonly (Tensor | undefined)[] {
  const [x, values, scales] = output.inputs as [Tensor, Tensor, Tensor];
  return [record(QUANTIZED_GRADIENT, [upstream, values, scales], x.shape), undefined, undefined];
}

const QUANTIZED_GRADIENT: Operation = {
  name: 'QuantizedGradient',
  write(output, [upstream, values, scales], writer) {
    const [, stored] = output.inputs as [Tensor, Tensor];
    if (stored.dtype === 'int8') {
      const weight = writer.node('DequantizeLinear', [values!, scales!], { axis: 1 });
      return writer.node('Gemm', [upstream!, weight], { transB: 1 });
    }
    return writer.node('Gemm', [upstream!, writeInt4(stored, values!, scales!, writer)]);
  },
};

/** Levels of `MatMulNBits`: activations in float32, or in 8 bits where the device has a kernel for it. */
const [EXACT_ACTIVATIONS, INT8_ACTIVATIONS] = [1, 4];

const INT4_PRODUCT: Operation = {
  name: 'Int4Product',
  gradient: inputGradient,
  write(output, [x, values, scales], writer) {
    const [, packed] = output.inputs as [Tensor, Tensor];
    const [out, blocks] = packed.shape as [number, number];
    return writer.node(
      'MatMulNBits',
      [x!, values!, scales!],
      {
        K: blocks * INT4_BLOCK,
        N: out,
        bits: 4,
        block_size: INT4_BLOCK,
        accuracy_level: output.attributes.exact ? EXACT_ACTIVATIONS : INT8_ACTIVATIONS,
      },
      'com.microsoft',
    );
  },
};
