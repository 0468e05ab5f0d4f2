import { describe, expect, it } from 'vitest';
import * as t from '../../src/tensor/index.ts';

const x = (...shape: t.Shape) => t.input('x', 'float32', shape);
const integers = (...shape: t.Shape) => t.input('ids', 'int64', shape);
const halves = (...shape: t.Shape) => t.input('half', 'float16', shape);
const [rows, columns] = ['rows', 'columns'].map(t.symbol) as [t.Dimension, t.Dimension];

/** What is wrong, and the operation and the operands that the message must name. */
const mistakes: Record<string, [() => unknown, string, ...string[]]> = {
  'sum of shapes that do not broadcast': [() => t.add(x(2, 3), x(2, 4)), 'Add', 'float32 [2, 3]', 'float32 [2, 4]'],
  'difference of other symbols': [() => t.subtract(x(rows), x(columns)), 'Sub', '[rows]', '[columns]'],
  'product of element types': [() => t.multiply(x(2), halves(2)), 'Mul', 'float32 [2]', 'float16 [2]'],
  'quotient of element types': [() => t.divide(integers(2), 2), 'Div', 'int64 [2]', 'float32 []'],
  'reshape to another volume': [() => t.reshape(x(2, 3), [4]), 'Reshape', '[4]', 'float32 [2, 3]'],
  'reshape that does not divide': [() => t.reshape(x(rows, 3), [rows, 2, -1]), 'Reshape', '[rows, 2, -1]', '[rows, 3]'],
  'reshape with two free axes': [() => t.reshape(x(6), [-1, -1]), 'Reshape', '[-1, -1]', '[6]'],
  'transposition that repeats an axis': [() => t.transpose(x(2, 3), [0, 0]), 'Transpose', '[0, 0]', '[2, 3]'],
  'transposition of other axes': [() => t.transpose(x(2, 3), [0, 1, 2]), 'Transpose', '[0, 1, 2]', '[2, 3]'],
  'parts that differ elsewhere': [() => t.concat([x(2, 3), x(3, 3)], 1), 'Concat', 'axis 1', '[2, 3]', '[3, 3]'],
  'parts of other types': [() => t.concat([x(2), halves(2)], 0), 'Concat', 'float32 [2]', 'float16 [2]'],
  'no parts': [() => t.concat([], 0), 'Concat', 'nothing'],
  'slice beyond the end': [() => t.slice(x(2, 5), 1, 3, 3), 'Slice', '3 elements from 3', 'axis 1', '[2, 5]'],
  'slice of no axis': [() => t.slice(x(2), 1, 0, 1), 'Slice', 'no axis 1', '[2]'],
  'uneven pieces': [() => t.split(x(2, 5), 2, -1), 'Split', 'divide into 2', '[2, 5]'],
  'padding of no axis': [() => t.pad(x(2), 4, 1, 1), 'Pad', 'no axis 4', '[2]'],
  'expansion of a longer axis': [() => t.expand(x(2, 3), [4, 3]), 'Expand', '[2, 3]', '[4, 3]'],
  'expansion to fewer axes': [() => t.expand(x(2, 3), [3]), 'Expand', '[3]', '[2, 3]'],
  'crop with a float corner': [() => t.crop(x(8, 8), x(2), [4, 4]), 'Crop', '[8, 8]', 'float32 [2]'],
  'crop of more axes': [() => t.crop(x(8), integers(2), [4, 4]), 'Crop', '[8]', 'int64 [2]'],
  'look-up by floats': [() => t.gather(x(4, 2), x(3)), 'Gather', 'float32 [4, 2]', 'float32 [3]'],
  'look-up in a scalar': [() => t.gather(x(), integers(3)), 'Gather', 'float32 []', 'int64 [3]'],
  'upsampling of no image': [() => t.upsampleNearest(x(2, 3)), 'Upsample', '[2, 3]'],
  'sum over no axis': [() => t.sum(x(2), [1]), 'ReduceSum', 'no axis 1', '[2]'],
  'mean over no axis': [() => t.mean(x(2), [-2]), 'ReduceMean', 'no axis -2', '[2]'],
  'linear layer of another width': [() => t.linear(x(2, 3), x(5, 4)), 'Linear', '[2, 3]', '[5, 4]'],
  'linear layer of another type': [() => t.linear(x(2, 3), halves(5, 3)), 'Linear', 'float32', 'float16'],
  'linear layer with another bias': [() => t.linear(x(2, 3), x(5, 3), x(4)), 'Linear', '[5, 3]', '[4]'],
  'linear layer with a half bias': [() => t.linear(x(2, 3), x(5, 3), halves(5)), 'Linear', 'float16 [5]'],
  'matrices that do not meet': [() => t.matmul(x(2, 3), x(4, 2)), 'MatMul', '[2, 3]', '[4, 2]'],
  'matrices of other batches': [() => t.matmul(x(2, 3, 4), x(5, 4, 3)), 'MatMul', '[2, 3, 4]', '[5, 4, 3]'],
  'convolution of other channels': [
    () => t.convolution(x(1, 3, 8, 8), x(4, 2, 3, 3)),
    'Conv',
    '[1, 3, 8, 8]',
    '[4, 2, 3, 3]',
  ],
  'convolution with another bias': [
    () => t.convolution(x(1, 2, 8, 8), x(4, 2, 1, 1), x(3)),
    'Conv',
    '[4, 2, 1, 1]',
    '[3]',
  ],
  'convolution that halves an unknown size': [
    () => t.convolution(x(1, 2, rows, 8), x(4, 2, 2, 2), undefined, { stride: 2 }),
    'Conv',
    'stride of 2',
    '[1, 2, rows, 8]',
  ],
  'normalisation of an unknown width': [() => t.layerNorm(x(2, rows), 1e-6), 'LayerNormalization', '[2, rows]'],
  'scale of another width': [() => t.rmsNorm(x(2, 3), x(4), 1e-6), 'RmsNorm', '[2, 3]', '[4]'],
  'groups that do not divide': [() => t.groupNorm(x(1, 6, 2, 2), 4, 1e-6), 'GroupNorm', '4 groups', '[1, 6, 2, 2]'],
  'groups of no image': [() => t.groupNorm(x(6), 2, 1e-6), 'GroupNorm', '[6]'],
  'heads that do not divide': [
    () => t.attention(x(1, 4, 6), x(1, 5, 6), x(1, 5, 6), { heads: 4 }),
    'Attention',
    '4 heads',
    '[1, 4, 6]',
    '[1, 5, 6]',
  ],
  'keys without values': [
    () => t.attention(x(1, 4, 6), x(1, 5, 6), x(1, 4, 6), { heads: 2 }),
    'Attention',
    '[1, 5, 6]',
  ],
  'attention of other types': [
    () => t.attention(x(1, 4, 6), halves(1, 5, 6), x(1, 5, 6), { heads: 2 }),
    'Attention',
    'float16 [1, 5, 6]',
  ],
  'attention with another bias': [
    () => t.attention(x(1, 4, 6), x(1, 5, 6), x(1, 5, 6), { heads: 2, bias: x(1, 2, 5, 4) }),
    'Attention',
    '[1, 4, 6]',
    '[1, 2, 5, 4]',
  ],
  'size of no axis': [() => t.size(x(2), 1), 'size', 'no axis 1', '[2]'],
  'gradient of a vector': [() => t.gradients(x(2), []), 'gradients', 'scalar', '[2]'],
};

describe('a mistake in a program shows where it is written', () => {
  for (const [name, [build, operation, ...parts]] of Object.entries(mistakes)) {
    it(name, () => {
      expect(build).toThrow(t.ShapeError);
      expect(build).toThrow(new RegExp(`^${operation}: `));
      for (const part of parts) expect(build).toThrow(part);
    });
  }
});

describe('shapes follow from symbols', () => {
  it('through patches, tokens and back', () => {
    const image = x(1, 3, t.times(2, rows), t.times(2, columns));
    const patches = t.reshape(image, [1, 3, rows, 2, columns, 2]);
    const tokens = t.reshape(t.transpose(patches, [0, 2, 4, 1, 3, 5]), [1, t.times(rows, columns), -1]);
    expect(tokens.shape.at(-1)).toBe(12);
    expect(t.shapeText(t.reshape(tokens, [1, rows, columns, 12]).shape)).toBe('[1, rows, columns, 12]');
  });

  it('through a convolution with a stride', () => {
    const halved = t.convolution(x(1, 2, t.times(2, rows), 8), x(4, 2, 3, 3), undefined, {
      stride: 2,
      padding: [0, 0, 1, 1],
    });
    expect(t.shapeText(halved.shape)).toBe('[1, 4, rows, 4]');
  });

  it('leaves out operations that change nothing', () => {
    const same = x(2, rows);
    expect(t.reshape(same, [2, rows])).toBe(same);
    expect(t.slice(same, 1, 0, rows)).toBe(same);
    expect(t.pad(same, 0, 0, 0)).toBe(same);
    expect(t.expand(same, [2, rows])).toBe(same);
    expect(t.cast(same, 'float32')).toBe(same);
    expect(t.concat([same], 0)).toBe(same);
  });

  it('looks up before it converts, so that a table is never converted whole', () => {
    const table = t.cast(t.parameter('table', 'float16', [1000, 8]), 'float32');
    const found = t.gather(table, integers(3));
    expect(found.dtype).toBe('float32');
    expect(found.inputs[0]!.shape).toEqual([3, 8]);
    const piece = t.crop(table, integers(1), [4]);
    expect(piece.inputs[0]).toMatchObject({ dtype: 'float16', shape: [4, 8] });
  });
});
