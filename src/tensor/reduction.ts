/** Sums, means and softmax. */

import { type Dimension, volume } from './dimension.ts';
import { divide, multiply, subtract } from './elementwise.ts';
import { cast, expand, reshape } from './layout.ts';
import { normalAxis, type Operation, record, type Tensor } from './tensor.ts';

interface ReductionOptions {
  /** Keep reduced axes with size 1 (default false). */
  keepAxes?: boolean;
}

/** The shape of `x` with the reduced axes kept as 1, for spreading a gradient back over them. */
function keptShape(x: Tensor, axes: readonly number[]): Dimension[] {
  return x.shape.map((dimension, axis) => (axes.includes(axis) ? 1 : dimension));
}

function reduction(name: string, gradient: (x: Tensor, spread: Tensor, axes: readonly number[]) => Tensor) {
  const operation: Operation = {
    name,
    gradient(output, upstream) {
      const x = output.inputs[0]!;
      const axes = output.attributes.axes as readonly number[];
      return [gradient(x, expand(reshape(upstream, keptShape(x, axes)), x.shape), axes)];
    },
    write: (output, [x], writer) =>
      writer.node(name, [x!, writer.integers(output.attributes.axes as readonly number[])], {
        keepdims: output.attributes.keepdims as number,
      }),
  };
  return (x: Tensor, axes?: readonly number[], { keepAxes = false }: ReductionOptions = {}): Tensor => {
    const over = (axes ?? x.shape.map((_, axis) => axis)).map((axis) => normalAxis(name, x, axis));
    const kept = keptShape(x, over);
    const shape = keepAxes ? kept : kept.filter((_, axis) => !over.includes(axis));
    return record(operation, [x], shape, { attributes: { axes: over, keepdims: keepAxes ? 1 : 0 } });
  };
}

/** Sum over axes (all by default). */
export const sum = reduction('ReduceSum', (_x, spread) => spread);

/** Mean over axes (all by default). */
export const mean = reduction('ReduceMean', (x, spread, axes) => {
  const count = volume(axes.map((axis) => x.shape[axis]!));
  return typeof count === 'number' ? multiply(spread, 1 / count) : divide(spread, cast(sizeOf(count), 'float32'));
});

const REDUCE_MAX: Operation = {
  name: 'ReduceMax',
  write: (_output, [x], writer) => writer.node('ReduceMax', [x!], { keepdims: 0 }),
};
/** The largest of all values, a scalar; for looking at, without a gradient. */
export function largest(x: Tensor): Tensor {
  return record(REDUCE_MAX, [x], []);
}

const SIZE_OF: Operation = {
  name: 'SizeOf',
  write: (output, _inputs, writer) => writer.dimension((output.attributes.size as readonly Dimension[])[0]!),
};
/** A dimension as an int64 tensor [1]. */
function sizeOf(size: Dimension): Tensor {
  return record(SIZE_OF, [], [1], { dtype: 'int64', attributes: { size: [size] } });
}

const SOFTMAX: Operation = {
  name: 'Softmax',
  gradient(output, upstream) {
    const weighted = multiply(upstream, output);
    return [subtract(weighted, multiply(output, sum(weighted, [-1], { keepAxes: true })))];
  },
};
/** Softmax over the last axis. */
export function softmax(x: Tensor): Tensor {
  return record(SOFTMAX, [x], x.shape, { attributes: { axis: -1 } });
}
