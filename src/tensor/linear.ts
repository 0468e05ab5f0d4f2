/** Matrix products. */

import { type Dimension, sameDimension, volume } from './dimension.ts';
import { add } from './elementwise.ts';
import { concat, joinedParts, reshape, slice, transpose } from './layout.ts';
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

export interface LinearOptions {
  /** Multiply in floating point where the weight is dequantised, too: for an x with values far larger than the rest. */
  exact?: boolean;
}

/**
 * x W^T + b: `x` [..., in], `weight` [out, in] as checkpoints store it, `bias` [out]; gives [..., out].
 * The form of the weight decides how it is multiplied: a dequantised one in its integers, one joined of several with
 * each of them, a low-rank sum with the base and the change apart.
 */
export function linear(x: Tensor, weight: Tensor, bias?: Tensor, options: LinearOptions = {}): Tensor {
  requireSameType('Linear', x, weight);
  const [out, width] = weight.shape;
  if (weight.shape.length !== 2 || !sameDimension(x.shape.at(-1)!, width!)) {
    misfit('Linear', 'the last axis of x must be the second of the weight', x, weight);
  }
  if (bias) requireVector('Linear', bias, out!, weight);
  if (weight.operation === LOW_RANK_SUM) {
    const [base, up, down] = weight.inputs as [Tensor, Tensor, Tensor];
    return add(linear(x, base, bias, options), linear(linear(x, down), up));
  }
  const parts = joinedParts(weight, 0);
  if (parts) return concat(partialProducts(x, parts, bias, options), -1);
  const leading = x.shape.slice(0, -1);
  const flat = reshape(x, [volume(leading), width!]);
  if (isDequantized(weight)) {
    const product = reshape(quantizedProduct(flat, weight, options.exact), [...leading, out!]);
    return bias ? add(product, bias) : product;
  }
  return reshape(gemm(flat, weight, false, true, bias), [...leading, out!]);
}

function partialProducts(
  x: Tensor,
  weights: readonly Tensor[],
  bias: Tensor | undefined,
  options: LinearOptions,
): Tensor[] {
  const parts = bias && joinedParts(bias, 0);
  const fits = parts?.length === weights.length && parts.every((part, i) => part.shape[0] === weights[i]!.shape[0]);
  const biases = fits ? parts : undefined;
  let start = 0;
  return weights.map((weight, i) => {
    const out = weight.shape[0] as number;
    const own = biases?.[i] ?? (bias && slice(bias, 0, start, out));
    const product = linear(x, weight, own, options);
    start += out;
    return product;
  });
}

const LOW_RANK_SUM: Operation = {
  name: 'LowRankSum',
  gradient(output, upstream) {
    const [, up, down] = output.inputs as [Tensor, Tensor, Tensor];
    return [upstream, gemm(upstream, down, false, true), gemm(up, upstream, true, false)];
  },
  write: (_output, [base, up, down], writer) => writer.node('Add', [base!, writer.node('MatMul', [up!, down!])]),
};
/** W + up down: a weight [out, in] with a low-rank change (LoRA, Hu et al. 2021), `up` [out, rank], `down` [rank, in]. */
export function lowRankSum(base: Tensor, up: Tensor, down: Tensor): Tensor {
  requireSameType('LowRankSum', base, up, down);
  const fits =
    [base, up, down].every(({ shape }) => shape.length === 2) &&
    sameDimension(base.shape[0]!, up.shape[0]!) &&
    sameDimension(up.shape[1]!, down.shape[0]!) &&
    sameDimension(base.shape[1]!, down.shape[1]!);
  if (!fits) misfit('LowRankSum', 'needs [out, in], [out, rank] and [rank, in]', base, up, down);
  const parts = joinedParts(base, 0);
  if (!parts) return record(LOW_RANK_SUM, [base, up, down], base.shape);
  // Each part by itself, so that their products stay apart.
  let start = 0;
  return concat(
    parts.map((part) => {
      const rows = slice(up, 0, start, part.shape[0]!);
      start += part.shape[0] as number;
      return lowRankSum(part, rows, down);
    }),
    0,
  );
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
