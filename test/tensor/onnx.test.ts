import { fromBinary } from '@bufbuild/protobuf';
import { describe, expect, it } from 'vitest';
import * as t from '../../src/tensor/index.ts';
import { type GraphProto, ModelProtoSchema, TensorProto_DataLocation } from '../../src/tensor/onnx_pb.ts';
import { evaluateProgram, maxDifference, randomFloats } from '../support/run.ts';

const [batch, rows, columns] = ['batch', 'rows', 'columns'].map(t.symbol) as [t.Dimension, t.Dimension, t.Dimension];

/** The graph of what is written for a program. */
function graphOf(
  outputs: Record<string, t.Tensor>,
  bind: (parameter: t.Tensor) => t.Binding = () => 'input',
  options?: t.OnnxOptions,
): GraphProto {
  return fromBinary(ModelProtoSchema, t.writeOnnx({ outputs }, bind, options).bytes).graph!;
}

const types = (graph: GraphProto) => graph.node.map(({ opType }) => opType);

describe('equal expressions', () => {
  it('are written once', () => {
    const x = t.input('x', 'float32', [2, 3]);
    const [left, right] = [t.exponential(x), t.exponential(x)];
    const graph = graphOf({ y: t.add(left, right), again: t.multiply(t.exponential(x), 2) });
    expect(types(graph).filter((type) => type === 'Exp')).toHaveLength(1);
  });

  it('are told from ones with other inputs or attributes', () => {
    const [x, y] = [t.input('x', 'float32', [2, 2]), t.input('y', 'float32', [2, 2])];
    expect(types(graphOf({ a: t.exponential(x), b: t.exponential(y) })).filter((type) => type === 'Exp')).toHaveLength(
      2,
    );
    const sums = graphOf({ a: t.sum(x, [0]), b: t.sum(x, [1]), c: t.sum(x, [0], { keepAxes: true }) });
    expect(types(sums).filter((type) => type === 'ReduceSum')).toHaveLength(3);
  });

  it('share constants of equal values and type only', () => {
    const x = t.input('x', 'float32', [2]);
    const zeros = (dtype: 'int32' | 'float32') =>
      t.constant({ dtype, shape: [2], data: dtype === 'int32' ? new Int32Array(2) : new Float32Array(2) });
    const graph = graphOf({ a: t.add(x, zeros('float32')), b: t.multiply(x, zeros('float32')), c: zeros('int32') });
    expect(graph.initializer).toHaveLength(2);
  });
});

describe('names', () => {
  it('of inputs and parameters must differ', () => {
    const clash = { y: t.add(t.input('x', 'float32', [2]), t.input('x', 'float32', [2])) };
    expect(() => graphOf(clash)).toThrow(/named "x"/);
    const mixed = { y: t.add(t.input('w', 'float32', [2]), t.parameter('w', 'float32', [2])) };
    expect(() => graphOf(mixed)).toThrow(/named "w"/);
  });

  it('may be the same for an input and an output', async () => {
    const x = t.input('x', 'float32', [2]);
    const { x: doubled } = await evaluateProgram({ x: t.add(x, x) }, { x: t.floats([2], [1, 2]) });
    expect([...doubled!.data]).toEqual([2, 4]);
  });

  it('of an input that is an output too, and of two outputs with one value, are kept apart', async () => {
    const x = t.input('x', 'float32', [2]);
    const values = t.floats([2], [1, 2]);
    const y = t.exponential(x);
    const results = await evaluateProgram({ x, first: y, second: y }, { x: values });
    expect(results.x!.data).toEqual(values.data);
    expect(results.first!.data).toEqual(results.second!.data);
  });
});

describe('parameters', () => {
  const weight = t.parameter('weight', 'float32', [2, 3]);
  const outputs = { y: t.linear(t.input('x', 'float32', [4, 3]), weight) };

  it('refer to their place in a file', () => {
    const graph = graphOf(outputs, () => ({ file: 'model.safetensors', offset: 4096, byteLength: 24 }));
    const [initializer] = graph.initializer;
    expect(initializer).toMatchObject({ name: 'weight', dims: [2n, 3n] });
    expect(initializer!.dataLocation).toBe(TensorProto_DataLocation.EXTERNAL);
    expect(initializer!.rawData).toHaveLength(0);
    expect(Object.fromEntries(initializer!.externalData.map(({ key, value }) => [key, value]))).toEqual({
      location: 'model.safetensors',
      offset: '4096',
      length: '24',
    });
    expect(graph.input.map(({ name }) => name)).toEqual(['x']);
  });

  it('are inputs where they are being trained', () => {
    const graph = graphOf(outputs);
    expect(graph.input.map(({ name }) => name)).toEqual(['x', 'weight']);
    expect(graph.initializer).toHaveLength(0);
  });

  it('hold a value in memory, whose size and type are checked', () => {
    const value = randomFloats([2, 3]);
    const [initializer] = graphOf(outputs, () => value).initializer;
    expect(initializer!.rawData).toEqual(new Uint8Array(value.data.buffer));
    expect(() => graphOf(outputs, () => randomFloats([3, 3]))).toThrow(/parameter "weight" has another type or size/);
    const halves = { dtype: 'float16', shape: [2, 3], data: new Uint16Array(6) } as const;
    expect(() => graphOf(outputs, () => halves)).toThrow(/parameter "weight"/);
  });
});

describe('symbolic shapes', () => {
  it('are left to the runtime where it can infer them', () => {
    const x = t.input('x', 'float32', [batch, 6, columns]);
    const graph = graphOf({ y: t.reshape(x, [batch, 2, 3, columns]), z: t.reshape(x, [batch, 6, columns, 1]) });
    expect(types(graph)).not.toContain('Shape');
    const shapes = graph.initializer.map(({ rawData }) => [...new BigInt64Array(rawData.slice().buffer)]);
    expect(shapes).toEqual([
      [0n, 2n, 3n, -1n],
      [0n, 6n, 0n, 1n],
    ]);
  });

  it('are computed where several sizes of a reshape are unknown', async () => {
    const x = t.input('x', 'float32', [batch, t.times(rows, columns), 4]);
    const sizes = t.input('sizes', 'float32', [rows, columns]);
    const image = t.transpose(t.reshape(x, [batch, rows, columns, 4]), [0, 3, 1, 2]);
    const values = randomFloats([2, 15, 4]);
    // The input that tells rows and columns must be part of the program.
    const { y } = await evaluateProgram(
      { y: t.add(image, t.multiply(sizes, 0)) },
      { x: values, sizes: randomFloats([3, 5]) },
    );
    expect(y!.shape).toEqual([2, 4, 3, 5]);
    expect(y!.data[0]).toBe(values.data[0]);
    expect(y!.data[15]).toBe(values.data[1]);
  });

  it('are found from inputs that have a multiple of them, and used in slices, paddings and expansions', async () => {
    const x = t.input('x', 'float32', [t.times(2, rows), 3]);
    const half = t.slice(x, 0, rows, rows);
    const padded = t.pad(half, 0, t.plus(rows, -1), 1);
    const wide = t.expand(t.reshape(t.sum(x), [1, 1]), [rows, t.plus(rows, 1)]);
    const values = randomFloats([8, 3]);
    const results = await evaluateProgram({ half, padded, wide }, { x: values });
    expect(results.half!.data).toEqual(values.data.slice(12));
    expect(results.padded!.shape).toEqual([8, 3]);
    expect(results.padded!.data.slice(9, 21)).toEqual(values.data.slice(12));
    expect(results.wide!.shape).toEqual([4, 5]);
  });

  it('that no input tells are an error', () => {
    const x = t.input('x', 'float32', [t.times(rows, columns)]);
    expect(() => graphOf({ y: t.reshape(x, [rows, columns]) })).toThrow(/No input tells the size of "rows"/);
  });
});

describe("attention without ONNX Runtime's own node", () => {
  it.each([false, true])('gives the same (bias: %s)', async (biased) => {
    const [q, k] = [t.input('q', 'float32', [2, rows, 8]), t.input('k', 'float32', [2, columns, 8])];
    const bias = biased ? { bias: t.input('bias', 'float32', [1, 2, rows, columns]) } : {};
    const outputs = { y: t.attention(q, k, t.square(k), { heads: 2, ...bias }) };
    const graph = graphOf(outputs, () => 'input', { fusedAttention: false });
    expect(types(graph)).not.toContain('MultiHeadAttention');
    const { InferenceSession, Tensor } = await import('onnxruntime-node');
    const feeds = {
      q: randomFloats([2, 3, 8], 1),
      k: randomFloats([2, 5, 8], 2),
      ...(biased && { bias: randomFloats([1, 2, 3, 5], 3) }),
    };
    const session = await InferenceSession.create(
      t.writeOnnx({ outputs }, () => 'input', { fusedAttention: false }).bytes,
      { graphOptimizationLevel: 'disabled' },
    );
    const tensors = Object.entries(feeds).map(([name, { data, shape }]) => [name, new Tensor('float32', data, shape)]);
    const plain = (await session.run(Object.fromEntries(tensors)))['output.y']!;
    const fused = (await evaluateProgram(outputs, feeds)).y!;
    expect(plain.dims).toEqual(fused.shape);
    expect(maxDifference({ data: plain.data as Float32Array }, fused)).toBeLessThan(1e-6);
    await session.release();
  });
});

describe('look-ups', () => {
  it('are listed with the conversion of what they read', () => {
    const table = t.cast(t.parameter('table', 'float16', [9, 4]), 'float32');
    const found = t.gather(table, t.input('ids', 'int64', [3]));
    const piece = t.crop(table, t.input('corner', 'int64', [1]), [2]);
    const program = { outputs: { y: t.multiply(found, 2), piece } };
    const { bytes, lookups } = t.writeOnnx(program, () => 'input');
    const { node } = fromBinary(ModelProtoSchema, bytes).graph!;
    const listed = node.filter(({ name }) => lookups.includes(name)).map(({ opType }) => opType);
    expect(listed.sort()).toEqual(['Cast', 'Cast', 'Gather', 'Slice']);
  });
});
