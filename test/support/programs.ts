/** Small programs that tests run on several devices; they run in a browser too. */

import type { CompileOptions, Runtime } from '../../src/runtime/runtime.ts';
import * as t from '../../src/tensor/index.ts';

export interface SmallProgram {
  readonly program: t.Program;
  readonly inputs: Readonly<Record<string, t.TensorData>>;
  readonly options: CompileOptions;
}

/** Smooth values in [-1, 1], different for each phase. */
export function wave(shape: readonly number[], phase = 0): t.FloatTensor {
  return t.floats(
    shape,
    Float32Array.from({ length: t.elementCount(shape) }, (_, i) => Math.sin(i + phase)),
  );
}

/** The loss of a convolution, attention and a linear layer, with its gradient with respect to all they are given. */
export function training(): SmallProgram {
  const inputs = {
    image: wave([1, 2, 6, 6]),
    kernel: wave([4, 2, 3, 3], 1),
    weight: wave([3, 4], 2),
    bias: wave([3], 3),
  };
  const given = Object.entries(inputs).map(([name, { shape }]) => t.input(name, 'float32', shape));
  const [image, kernel, weight, bias] = given as [t.Tensor, t.Tensor, t.Tensor, t.Tensor];
  const features = t.silu(t.convolution(image, kernel, undefined, { padding: [1, 1, 1, 1] }));
  const tokens = t.transpose(t.reshape(features, [1, 4, 36]), [0, 2, 1]);
  const mixed = t.layerNorm(t.attention(tokens, tokens, tokens, { heads: 2 }), 1e-6);
  const loss = t.mean(t.square(t.linear(mixed, weight, bias)));
  const gradients = t.gradients(loss, given).map((gradient, i) => [`gradient of ${given[i]!.name}`, gradient]);
  return { program: { outputs: { loss, ...Object.fromEntries(gradients) } }, inputs, options: { bind: () => 'input' } };
}

/** Rows of a float16 table and a float32 matrix, both bound to places in a safetensors file. */
export function boundWeights(): SmallProgram & { readonly file: Uint8Array } {
  const table = t.toFloat16(wave([8, 6], 4).data);
  const matrix = wave([5, 6], 5).data;
  const header = new TextEncoder().encode(
    JSON.stringify({
      table: { dtype: 'F16', shape: [8, 6], data_offsets: [0, table.byteLength] },
      matrix: { dtype: 'F32', shape: [5, 6], data_offsets: [table.byteLength, table.byteLength + matrix.byteLength] },
    }),
  );
  const file = new Uint8Array(8 + header.length + table.byteLength + matrix.byteLength);
  new DataView(file.buffer).setBigUint64(0, BigInt(header.length), true);
  const tableAt = 8 + header.length;
  file.set(header, 8);
  file.set(new Uint8Array(table.buffer), tableAt);
  file.set(new Uint8Array(matrix.buffer), tableAt + table.byteLength);

  const places: Record<string, t.Binding> = {
    table: { file: 'weights.safetensors', offset: tableAt, byteLength: table.byteLength },
    matrix: { file: 'weights.safetensors', offset: tableAt + table.byteLength, byteLength: matrix.byteLength },
  };
  const rows = t.gather(
    t.cast(t.parameter('table', 'float16', [8, 6]), 'float32'),
    t.input('ids', 'int64', [2, t.symbol('length')]),
  );
  const result = t.linear(rows, t.parameter('matrix', 'float32', [5, 6]));
  return {
    file,
    program: { outputs: { result } },
    inputs: { ids: { dtype: 'int64', shape: [2, 3], data: BigInt64Array.of(0n, 7n, 3n, 3n, 1n, 6n) } },
    options: { bind: ({ name }) => places[name!]!, files: [{ name: 'weights.safetensors', bytes: file }] },
  };
}

/** Values that come and go in half precision. */
export function halfPrecision(): SmallProgram {
  const x = t.input('x', 'float16', [2, 5]);
  const program = { outputs: { result: t.cast(t.exponential(t.cast(x, 'float32')), 'float16') } };
  const inputs = { x: { dtype: 'float16', shape: [2, 5], data: t.toFloat16(wave([2, 5]).data) } as const };
  return { program, inputs, options: { bind: () => 'input' } };
}

export const smallPrograms = { training, boundWeights, halfPrecision };

export async function runSmall(
  runtime: Runtime,
  { program, inputs, options }: SmallProgram,
): Promise<Record<string, t.TensorData>> {
  const executable = await runtime.compile(program, options);
  try {
    return await executable.run(inputs);
  } finally {
    await executable.dispose();
  }
}
