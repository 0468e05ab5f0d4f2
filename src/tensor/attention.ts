/** Multi-head scaled dot-product attention. */

import { type Dimension, sameDimension, sameShape } from './dimension.ts';
import { absolute, add, multiply, subtract } from './elementwise.ts';
import { inOrder } from './gradient.ts';
import { concat, reshape, transpose } from './layout.ts';
import { matmul, matmulTransposed } from './linear.ts';
import type { OnnxWriter } from './onnx.ts';
import { largest, softmax, sum } from './reduction.ts';
import { misfit, type Operation, record, requireSameType, type Tensor } from './tensor.ts';

export interface AttentionOptions {
  heads: number;
  /** Factor on the products of queries and keys (default 1 / sqrt(head width)). */
  scale?: number;
  /** Added to the scaled products: [1 or batch, heads or 1, queries, keys]. */
  bias?: Tensor;
}

/** [B,T,heads*d] to [B,heads,T,d]. */
function splitHeads(x: Tensor, heads: number): Tensor {
  const [batch, tokens, width] = x.shape as [Dimension, Dimension, number];
  return transpose(reshape(x, [batch, tokens, heads, width / heads]), [0, 2, 1, 3]);
}

/** [B,heads,T,d] to [B,T,heads*d]. */
function joinHeads(x: Tensor): Tensor {
  const [batch, heads, tokens, width] = x.shape as [Dimension, number, Dimension, number];
  return reshape(transpose(x, [0, 2, 1, 3]), [batch, tokens, heads * width]);
}

const ATTENTION: Operation = {
  name: 'MultiHeadAttention',
  domain: 'com.microsoft',
  gradient(output, upstream) {
    const [query, key, value, bias] = output.inputs as [Tensor, Tensor, Tensor, Tensor?];
    const { num_heads: heads, scale } = output.attributes as { num_heads: number; scale: number };
    const [q, k, v, up] = [query, key, value, upstream].map((x) => splitHeads(x, heads)) as [
      Tensor,
      Tensor,
      Tensor,
      Tensor,
    ];
    const scaled = multiply(matmulTransposed(q, k), scale);
    const weights = softmax(bias ? add(scaled, bias) : scaled);
    const valueGradient = matmul(transpose(weights, [0, 1, 3, 2]), up);
    const weighted = multiply(matmulTransposed(up, v), weights);
    const logits = subtract(weighted, multiply(weights, sum(weighted, [-1], { keepAxes: true })));
    const products = multiply(logits, scale);
    const gradients = [
      joinHeads(matmul(products, k)),
      joinHeads(matmul(transpose(products, [0, 1, 3, 2]), q)),
      joinHeads(valueGradient),
    ];
    if (!bias) return gradients;
    const axes = bias.shape.flatMap((dimension, axis) => (dimension === 1 ? [axis] : []));
    return [...gradients, axes.length > 0 ? sum(logits, axes, { keepAxes: true }) : logits];
  },
  write(output, [query, key, value, bias], writer) {
    if (!writer.fusedAttention) return writePlain(output, [query!, key!, value!, bias], writer);
    const operands = bias ? [query!, key!, value!, '', '', bias] : [query!, key!, value!];
    return writer.node('MultiHeadAttention', operands, output.attributes, 'com.microsoft');
  },
};

/** The definition in elementary nodes, for devices whose own kernel gives wrong values. It stores all the weights. */
function writePlain(
  output: Tensor,
  [query, key, value, bias]: readonly [string, string, string, string | undefined],
  writer: OnnxWriter,
): string {
  const { num_heads: heads, scale } = output.attributes as { num_heads: number; scale: number };
  const width = output.shape[2] as number;
  // In a shape, 0 keeps the size of the axis.
  const split = (x: string, order: readonly number[]) =>
    writer.node('Transpose', [writer.node('Reshape', [x, writer.integers([0, 0, heads, width / heads])])], {
      perm: order,
    });
  const scaled = writer.node('Mul', [split(query, [0, 2, 1, 3]), writer.floats([scale])]);
  const products = writer.node('MatMul', [scaled, split(key, [0, 2, 3, 1])]);
  const weights = writer.node('Softmax', [bias ? writer.node('Add', [products, bias]) : products], { axis: -1 });
  const joined = writer.node('Transpose', [writer.node('MatMul', [weights, split(value, [0, 2, 1, 3])])], {
    perm: [0, 2, 1, 3],
  });
  return writer.node('Reshape', [joined, writer.integers([0, 0, width])]);
}

/** softmax(q k^T * scale + bias) v, each head apart: q [B,T,heads*d], k and v [B,S,heads*d]; gives [B,T,heads*d]. */
export function attention(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions): Tensor {
  const { heads, bias } = options;
  requireSameType('Attention', query, key, value, ...(bias ? [bias] : []));
  const width = query.shape.at(-1);
  const fits =
    [query, key, value].every(({ shape }) => shape.length === 3 && sameDimension(shape[0]!, query.shape[0]!)) &&
    typeof width === 'number' &&
    width % heads === 0 &&
    key.shape[2] === width &&
    value.shape[2] === width &&
    sameDimension(key.shape[1]!, value.shape[1]!);
  if (!fits)
    misfit('Attention', `needs [batch, tokens, width] with a width that ${heads} heads divide`, query, key, value);
  if (bias) requireBias(query, key, bias, heads);
  const scale = options.scale ?? 1 / Math.sqrt((width as number) / heads);
  return record(ATTENTION, bias ? [query, key, value, bias] : [query, key, value], query.shape, {
    attributes: { num_heads: heads, scale },
  });
}

/**
 * The largest magnitude of query-key products, scaled, in all attentions that some results are computed with: what grows
 * before a transformer without QK norm diverges (SD3 paper, section 5.3.2). A scalar; undefined without attention.
 */
export function largestAttentionLogit(results: readonly Tensor[]): Tensor | undefined {
  const peaks = inOrder(results).flatMap(({ operation, inputs: [query, key], attributes }) => {
    if (operation !== ATTENTION) return [];
    const { num_heads: heads, scale } = attributes as { num_heads: number; scale: number };
    const logits = matmulTransposed(splitHeads(query!, heads), splitHeads(key!, heads));
    return [reshape(multiply(largest(absolute(logits)), Math.abs(scale)), [1])];
  });
  return peaks.length === 0 ? undefined : largest(concat(peaks, 0));
}

function requireBias(query: Tensor, key: Tensor, bias: Tensor, heads: number): void {
  const [batch, queries, keys] = [query.shape[0]!, query.shape[1]!, key.shape[1]!];
  const [first, second, ...rest] = bias.shape;
  const fits =
    bias.shape.length === 4 &&
    (first === 1 || sameDimension(first!, batch)) &&
    (second === 1 || second === heads) &&
    sameShape(rest, [queries, keys]);
  if (!fits) misfit('Attention', `needs a bias [1 or batch, 1 or ${heads}, queries, keys]`, query, key, bias);
}
