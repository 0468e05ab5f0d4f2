/** Operations that move elements without changing them: shapes, orders, pieces, look-ups. */

import type { DType } from './data.ts';
import {
  type Dimension,
  exactQuotient,
  plus,
  type Shape,
  sameDimension,
  sameShape,
  shapeText,
  times,
  volume,
} from './dimension.ts';
import { sum } from './reduction.ts';
import {
  broadcastShape,
  constant,
  misfit,
  normalAxis,
  type Operation,
  record,
  ShapeError,
  type Tensor,
} from './tensor.ts';

const RESHAPE: Operation = {
  name: 'Reshape',
  gradient: (output, upstream) => [reshape(upstream, output.inputs[0]!.shape)],
  write: (output, [x], writer) => writer.node('Reshape', [x!, writer.shapeFor(output.inputs[0]!, output.shape)]),
};
/** The same elements in another shape. One dimension may be -1: whatever is left over. */
export function reshape(x: Tensor, shape: Shape): Tensor {
  const known = shape.filter((dimension) => dimension !== -1);
  const rest = exactQuotient(volume(x.shape), volume(known));
  const free = shape.length - known.length;
  if (rest === undefined || free > 1 || (free === 0 && rest !== 1)) {
    misfit('Reshape', `elements do not fill ${shapeText(shape)}`, x);
  }
  const target = shape.map((dimension) => (dimension === -1 ? rest : dimension));
  return sameShape(target, x.shape) ? x : record(RESHAPE, [x], target);
}

const TRANSPOSE: Operation = {
  name: 'Transpose',
  gradient(output, upstream) {
    const order = output.attributes.perm as readonly number[];
    return [
      transpose(
        upstream,
        order.map((_, axis) => order.indexOf(axis)),
      ),
    ];
  },
};
/** Axes in another order: axis `i` of the result is axis `order[i]` of `x`. */
export function transpose(x: Tensor, order: readonly number[]): Tensor {
  if (order.length !== x.shape.length || x.shape.some((_, axis) => !order.includes(axis))) {
    misfit('Transpose', `[${order.join(', ')}] is not an order of the axes`, x);
  }
  return record(
    TRANSPOSE,
    [x],
    order.map((axis) => x.shape[axis]!),
    { attributes: { perm: order } },
  );
}

const CONCAT: Operation = {
  name: 'Concat',
  gradient(output, upstream) {
    const axis = output.attributes.axis as number;
    let start: Dimension = 0;
    return output.inputs.map((part) => {
      const piece = slice(upstream, axis, start, part.shape[axis]!);
      start = plus(start, part.shape[axis]!);
      return piece;
    });
  },
};
/** Tensors joined along an axis. */
export function concat(parts: readonly Tensor[], axis: number): Tensor {
  const [first] = parts;
  if (!first) throw new ShapeError('Concat: there is nothing to join.');
  const at = normalAxis('Concat', first, axis);
  for (const part of parts) {
    const fits =
      part.dtype === first.dtype &&
      part.shape.length === first.shape.length &&
      part.shape.every((dimension, i) => i === at || sameDimension(dimension, first.shape[i]!));
    if (!fits) misfit('Concat', `parts differ outside axis ${at}`, first, part);
  }
  if (parts.length === 1) return first;
  const total = plus(...parts.map((part) => part.shape[at]!));
  return record(CONCAT, parts, first.shape.with(at, total), { attributes: { axis: at } });
}

/** What was joined along an axis, where a tensor is such a join. */
export function joinedParts(x: Tensor, axis: number): readonly Tensor[] | undefined {
  return x.operation === CONCAT && x.attributes.axis === normalAxis('Concat', x, axis) ? x.inputs : undefined;
}

const SLICE: Operation = {
  name: 'Slice',
  gradient(output, upstream) {
    const x = output.inputs[0]!;
    const { axis, start, stride } = output.attributes as { axis: number; start: Shape; stride: number };
    if (stride !== 1) throw new RangeError('A slice with a stride has no gradient rule.');
    const length = output.shape[axis]!;
    const after = plus(x.shape[axis]!, times(-1, start[0]!), times(-1, length));
    return [pad(upstream, axis, start[0]!, after)];
  },
  write(output, [x], writer) {
    const { axis, start, stride } = output.attributes as { axis: number; start: Shape; stride: number };
    const reach = plus(times(stride, plus(output.shape[axis]!, -1)), 1);
    return writer.node('Slice', [
      x!,
      writer.shape(start),
      writer.shape([plus(start[0]!, reach)]),
      writer.integers([axis]),
      writer.integers([stride]),
    ]);
  },
};
/** `length` elements of one axis from `start`, every `stride`-th. Sizes are trusted where they are symbolic. */
export function slice(x: Tensor, axis: number, start: Dimension, length: Dimension, stride = 1): Tensor {
  const at = normalAxis('Slice', x, axis);
  const size = x.shape[at]!;
  if (start === 0 && stride === 1 && sameDimension(length, size)) return x;
  if (typeof size === 'number' && typeof start === 'number' && typeof length === 'number') {
    if (start < 0 || length < 1 || start + stride * (length - 1) >= size) {
      misfit('Slice', `${length} elements from ${start} do not exist on axis ${at}`, x);
    }
  }
  return record(SLICE, [x], x.shape.with(at, length), { attributes: { axis: at, start: [start], stride } });
}

/** Equal pieces of an axis. */
export function split(x: Tensor, pieces: number, axis: number): Tensor[] {
  const at = normalAxis('Split', x, axis);
  const length = exactQuotient(x.shape[at]!, pieces);
  if (length === undefined) misfit('Split', `axis ${at} does not divide into ${pieces}`, x);
  const parts = joinedParts(x, at);
  if (
    parts &&
    parts.length % pieces === 0 &&
    parts.every((part) => sameDimension(part.shape[at]!, parts[0]!.shape[at]!))
  ) {
    const each = parts.length / pieces;
    return Array.from({ length: pieces }, (_, i) => concat(parts.slice(i * each, (i + 1) * each), at));
  }
  return Array.from({ length: pieces }, (_, i) => slice(x, at, times(i, length), length));
}

const PAD: Operation = {
  name: 'Pad',
  gradient(output, upstream) {
    const { axis, before } = output.attributes as { axis: number; before: Shape };
    return [slice(upstream, axis, before[0]!, output.inputs[0]!.shape[axis]!)];
  },
  write(output, [x], writer) {
    const { axis, before, after } = output.attributes as { axis: number; before: Shape; after: Shape };
    return writer.node('Pad', [x!, writer.shape([...before, ...after]), '', writer.integers([axis])]);
  },
};
/** Zeros before and after the elements of an axis. */
export function pad(x: Tensor, axis: number, before: Dimension, after: Dimension): Tensor {
  const at = normalAxis('Pad', x, axis);
  if (before === 0 && after === 0) return x;
  const size = plus(before, x.shape[at]!, after);
  return record(PAD, [x], x.shape.with(at, size), { attributes: { axis: at, before: [before], after: [after] } });
}

const EXPAND: Operation = {
  name: 'Expand',
  gradient(output, upstream) {
    const x = output.inputs[0]!;
    const added = output.shape.length - x.shape.length;
    const axes = output.shape.flatMap((dimension, axis) =>
      axis < added || !sameDimension(dimension, x.shape[axis - added]!) ? [axis] : [],
    );
    return [reshape(sum(upstream, axes, { keepAxes: true }), x.shape)];
  },
  write: (output, [x], writer) => writer.node('Expand', [x!, writer.shape(output.shape)]),
};
/** Repeats axes of size 1 to fill a shape. */
export function expand(x: Tensor, shape: Shape): Tensor {
  if (sameShape(x.shape, shape)) return x;
  const target = constant({ dtype: x.dtype, shape: [], data: new Float32Array(1) });
  if (!sameShape(broadcastShape('Expand', x, { ...target, shape }), shape)) {
    misfit('Expand', `cannot fill ${shapeText(shape)}`, x);
  }
  return record(EXPAND, [x], shape);
}

const CROP: Operation = {
  name: 'Crop',
  lookup: true,
  gradient: () => [undefined, undefined],
  write(output, [x, corner], writer) {
    const axes = (output.attributes.sizes as Shape).map((_, axis) => axis);
    const sizes = writer.shape(output.shape.slice(0, axes.length));
    return writer.node('Slice', [x!, corner!, writer.node('Add', [corner!, sizes]), writer.integers(axes)]);
  },
};
/** A piece of the leading axes whose corner (int64, one entry for each) is known only when the program runs. Not differentiable. */
export function crop(x: Tensor, corner: Tensor, sizes: Shape): Tensor {
  if (corner.dtype !== 'int64' || !sameShape(corner.shape, [sizes.length]) || sizes.length > x.shape.length) {
    misfit('Crop', 'the corner needs one int64 for each cropped axis', x, corner);
  }
  if (x.operation === CAST) return cast(crop(x.inputs[0]!, corner, sizes), x.dtype);
  return record(CROP, [x, corner], [...sizes, ...x.shape.slice(sizes.length)], { attributes: { sizes } });
}

const CAST: Operation = {
  name: 'Cast',
  gradient: (output, upstream) => [cast(upstream, output.inputs[0]!.dtype)],
  write: (output, [x], writer) => writer.node('Cast', [x!], { to: writer.elementType(output.dtype) }),
};
/** The same values in another element type. */
export function cast(x: Tensor, dtype: DType): Tensor {
  return x.dtype === dtype ? x : record(CAST, [x], x.shape, { dtype });
}

const GATHER: Operation = {
  name: 'Gather',
  lookup: true,
  gradient(output, upstream) {
    const [table, ids] = output.inputs as [Tensor, Tensor];
    return [record(SCATTER_ROWS, [ids, upstream], table.shape, { dtype: 'float32' }), undefined];
  },
};
/** Rows of a table `[rows, ...]` by ids (int32 or int64) of any shape: the result is `[...ids, ...]`. */
export function gather(table: Tensor, ids: Tensor): Tensor {
  if (ids.dtype !== 'int64' && ids.dtype !== 'int32') misfit('Gather', 'ids must be integers', table, ids);
  if (table.shape.length === 0) misfit('Gather', 'a table needs rows', table, ids);
  // Converting the few rows that are looked up beats converting the table.
  if (table.operation === CAST) return cast(gather(table.inputs[0]!, ids), table.dtype);
  return record(GATHER, [table, ids], [...ids.shape, ...table.shape.slice(1)], { attributes: { axis: 0 } });
}

/** Adds rows into a table of zeros; the gradient of {@link gather}. */
const SCATTER_ROWS: Operation = {
  name: 'ScatterRows',
  write(output, [ids, rows], writer) {
    const [idsTensor, upstream] = output.inputs as [Tensor, Tensor];
    const count = volume(idsTensor.shape);
    const flatIds = writer.node('Reshape', [
      writer.node('Cast', [ids!], { to: writer.elementType('int64') }),
      writer.shape([count, 1]),
    ]);
    const flatRows = writer.node('Reshape', [rows!, writer.shape([count, ...output.shape.slice(1)])]);
    const zeros = writer.node('ConstantOfShape', [writer.shape(output.shape)]);
    if (upstream.dtype !== 'float32') throw new RangeError('Gradients of tables are float32.');
    return writer.node('ScatterND', [zeros, flatIds, flatRows], { reduction: 'add' });
  },
};

const UPSAMPLE: Operation = {
  name: 'Upsample',
  gradient(output, upstream) {
    const [batch, channels, height, width] = output.inputs[0]!.shape as [Dimension, Dimension, Dimension, Dimension];
    const blocks = reshape(upstream, [batch, channels, height, 2, width, 2]);
    return [sum(blocks, [3, 5])];
  },
  write: (_output, [x], writer) =>
    writer.node('Resize', [x!, '', writer.floats([1, 1, 2, 2])], {
      mode: 'nearest',
      coordinate_transformation_mode: 'asymmetric',
      nearest_mode: 'floor',
    }),
};
/** An image [B,C,H,W] at twice its size, each pixel repeated 2x2. */
export function upsampleNearest(x: Tensor): Tensor {
  if (x.shape.length !== 4) misfit('Upsample', 'needs [batch, channels, height, width]', x);
  const [batch, channels, height, width] = x.shape as [Dimension, Dimension, Dimension, Dimension];
  return record(UPSAMPLE, [x], [batch, channels, times(2, height), times(2, width)]);
}
