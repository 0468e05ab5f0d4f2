/** Matrix products. */

import { type Dimension, sameDimension, volume } from './dimension.ts';
import { reshape, transpose } from './layout.ts';
import { isDequantized, quantizedProduct } from './quantized.ts';
import { sum } from './reduction.ts';
import { misfit, type Operation, record, requireSameType, requireVector, type Tensor } from './tensor.ts';

const GEMM: Operation = {
  name: 'Gemm',
  gradient(output, upstream) {
    const [a, b, bias] = output.inputs as [Tensor, Tensor, Tensor?];
    const { transA, transB } = output.attributes as { transA: number; transB: number };
    const left = transA ? gemm(b, upstream, !!transB, true) : gemm(upstream, b, false, !transB);
    const right = transB ? gemm(upstream, a, true, !!transA) : gemm(a, upstream, !transA, false);
    return bias ? [left, right, sum(upstream, [0])] : [left, right];
  },
};

/** op(a) op(b) + bias for matrices, where op transposes when asked to. */
function gemm(a: Tensor, b: Tensor, transposeA: boolean, transposeB: boolean, bias?: Tensor): Tensor {
  const rows = a.shape[transposeA ? 1 : 0]!;
  const columns = b.shape[transposeB ? 0 : 1]!;
  return record(GEMM, bias ? [a, b, bias] : [a, b], [rows, columns], {
    attributes: { transA: transposeA ? 1 : 0, transB: transposeB ? 1 : 0 },
  });
}

/**
 * x W^T + b: `x` [..., in], `weight` [out, in] as checkpoints store it, `bias` [out]; gives [..., out]. A dequantised
 * weight is multiplied in its integers.
 */
export function linear(x: Tensor, weight: Tensor, bias?: Tensor): Tensor {
  requireSameType('Linear', x, weight);
  const [out, width] = weight.shape;
  if (weight.shape.length !== 2 || !sameDimension(x.shape.at(-1)!, width!)) {
    misfit('Linear', 'the last axis of x must be the second of the weight', x, weight);
  }
  if (bias) requireVector('Linear', bias, out!, weight);
  const leading = x.shape.slice(0, -1);
  const flat = reshape(x, [volume(leading), width!]);
  const product = isDequantized(weight) ? quantizedProduct(flat, weight, bias) : gemm(flat, weight, false, true, bias);
  return reshape(product, [...leading, out!]);
}

function swapLast(x: Tensor): Tensor {
  const order = x.shape.map((_, axis) => axis);
  order.push(...order.splice(-2).reverse());
  return transpose(x, order);
}

const MATMUL: Operation = {
  name: 'MatMul',
  gradient(output, upstream) {
    const [a, b] = output.inputs as [Tensor, Tensor];
    return [matmul(upstream, swapLast(b)), matmul(swapLast(a), upstream)];
  },
};
/** Batched matrix product [..., n, k] x [..., k, m]; the leading axes must be equal. */
export function matmul(a: Tensor, b: Tensor): Tensor {
  requireSameType('MatMul', a, b);
  const rankFits = a.shape.length >= 2 && a.shape.length === b.shape.length;
  const leadingFits = rankFits && a.shape.slice(0, -2).every((size, axis) => sameDimension(size, b.shape[axis]!));
  if (!leadingFits || !sameDimension(a.shape.at(-1)!, b.shape.at(-2)!)) {
    misfit('MatMul', 'needs [..., n, k] and [..., k, m] with equal leading axes', a, b);
  }
  return record(MATMUL, [a, b], [...a.shape.slice(0, -1), b.shape.at(-1)!] as Dimension[]);
}

/** {@link matmul} against the transpose of `b`: [..., n, k] x [..., m, k]. */
export function matmulTransposed(a: Tensor, b: Tensor): Tensor {
  return matmul(a, swapLast(b));
}
