/** Two-dimensional convolution of images [B,C,H,W] with kernels [out,in,k,k]. */

import { type Dimension, dividedBy, plus, times } from './dimension.ts';
import { concat, pad, reshape, slice, transpose } from './layout.ts';
import { matmulTransposed } from './linear.ts';
import { sum } from './reduction.ts';
import { misfit, type Operation, record, requireSameType, requireVector, type Tensor } from './tensor.ts';

export interface ConvolutionOptions {
  /** Step between outputs (default 1). */
  stride?: number;
  /** Zeros added [top, left, bottom, right] (default none). */
  padding?: readonly [number, number, number, number];
}

type Size4 = [Dimension, Dimension, Dimension, Dimension];

const CONVOLUTION: Operation = {
  name: 'Conv',
  gradient(output, upstream) {
    const [x, kernel, bias] = output.inputs as [Tensor, Tensor, Tensor?];
    const gradients = [inputGradient(output, upstream, x, kernel), kernelGradient(output, upstream, x, kernel)];
    return bias ? [...gradients, sum(upstream, [0, 2, 3])] : gradients;
  },
};

/** `x` [B,in,H,W] * `kernel` [out,in,k,k] + `bias` [out]. */
export function convolution(x: Tensor, kernel: Tensor, bias?: Tensor, options: ConvolutionOptions = {}): Tensor {
  requireSameType('Conv', x, kernel);
  const { stride = 1, padding = [0, 0, 0, 0] } = options;
  const [batch, channels, height, width] = x.shape as Size4;
  const [out, input, side] = kernel.shape as [number, number, number];
  if (x.shape.length !== 4 || kernel.shape.length !== 4 || channels !== input) {
    misfit('Conv', 'the image must have as many channels as the kernel', x, kernel);
  }
  if (bias) requireVector('Conv', bias, out, kernel);
  const steps = (size: Dimension, before: number, after: number): Dimension => {
    const count = dividedBy(plus(size, before + after - side), stride);
    if (count === undefined) misfit('Conv', `a stride of ${stride} does not fit the size`, x, kernel);
    return plus(count, 1);
  };
  const shape = [batch, out, steps(height, padding[0], padding[2]), steps(width, padding[1], padding[3])];
  return record(CONVOLUTION, bias ? [x, kernel, bias] : [x, kernel], shape, {
    attributes: { kernel_shape: [side, side], pads: padding, strides: [stride, stride] },
  });
}

const FLIP: Operation = {
  name: 'Flip',
  write: (_output, [kernel], writer) =>
    writer.node('Slice', [
      kernel!,
      writer.integers([-1, -1]),
      writer.integers([-(2 ** 31), -(2 ** 31)]),
      writer.integers([2, 3]),
      writer.integers([-1, -1]),
    ]),
};

const CONVOLUTION_TRANSPOSED: Operation = { name: 'ConvTranspose' };

/** The upstream gradient convolved with the kernel turned by 180 degrees and its channels exchanged. */
function inputGradient(output: Tensor, upstream: Tensor, x: Tensor, kernel: Tensor): Tensor {
  const [top, left, bottom, right] = output.attributes.pads as [number, number, number, number];
  const [stride] = output.attributes.strides as [number];
  const side = kernel.shape[2] as number;
  if (stride === 1) {
    const exchanged = transpose(kernel, [1, 0, 2, 3]);
    const turned = side === 1 ? exchanged : record(FLIP, [exchanged], exchanged.shape);
    const padding = [top, left, bottom, right].map((zeros) => side - 1 - zeros);
    return convolution(upstream, turned, undefined, { padding: padding as [number, number, number, number] });
  }
  // Rows and columns of x that the last stride did not reach get a zero gradient through output_padding.
  const missing = ([axis, zeros]: [number, number]) => {
    const reached = plus(times(stride, plus(upstream.shape[axis]!, -1)), side - zeros);
    const rest = plus(x.shape[axis]!, times(-1, reached));
    if (typeof rest !== 'number') misfit('Conv', 'the size must be a multiple of the stride', x, kernel);
    return rest;
  };
  const gaps = (
    [
      [2, top + bottom],
      [3, left + right],
    ] as [number, number][]
  ).map(missing);
  return record(CONVOLUTION_TRANSPOSED, [upstream, kernel], x.shape, {
    attributes: {
      kernel_shape: [side, side],
      pads: [top, left, bottom, right],
      strides: [stride, stride],
      output_padding: gaps,
    },
  });
}

/** For each kernel position, the upstream gradient times the part of x that position saw. */
function kernelGradient(output: Tensor, upstream: Tensor, x: Tensor, kernel: Tensor): Tensor {
  const [top, left, bottom, right] = output.attributes.pads as [number, number, number, number];
  const [stride] = output.attributes.strides as [number];
  const [out, input, side] = kernel.shape as [number, number, number];
  const [batch, , height, width] = upstream.shape as Size4;
  const padded = pad(pad(x, 2, top, bottom), 3, left, right);
  // Columns first: what is left of a row's shift is one run of memory.
  const shifted = Array.from({ length: side }, (_, column) => slice(padded, 3, column, width, stride));
  const seen = Array.from({ length: side }, (_, row) =>
    shifted.map((part) => slice(part, 2, row, height, stride)),
  ).flat();
  const pixels = times(height, width);
  const columns = reshape(concat(seen, 1), [batch, side * side * input, pixels]);
  const products = matmulTransposed(reshape(upstream, [batch, out, pixels]), columns);
  return transpose(reshape(sum(products, [0]), [out, side, side, input]), [0, 3, 1, 2]);
}
