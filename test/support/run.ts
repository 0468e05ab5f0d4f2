import { nodeRuntime } from '../../src/runtime/node.node.ts';
import { type FloatTensor, floats, input, type Tensor, type TensorData } from '../../src/tensor/index.ts';

export const cpu = nodeRuntime({ device: 'cpu', threads: 2 });

/** Runs a program without parameters once. */
export async function evaluateProgram(
  outputs: Record<string, Tensor>,
  inputs: Record<string, TensorData>,
  runtime = cpu,
): Promise<Record<string, TensorData>> {
  const executable = await runtime.compile({ outputs }, { bind: () => 'input' });
  try {
    return await executable.run(inputs);
  } finally {
    await executable.dispose();
  }
}

/** Values in [-1, 1) that are the same at every run. */
export function randomFloats(shape: readonly number[], seed = 1): FloatTensor {
  let state = seed * 2654435761 + 12345;
  const data = new Float32Array(shape.reduce((a, b) => a * b, 1)).map(() => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 31 - 1;
  });
  return floats(shape, data);
}

/** An input tensor with the shape of given values. */
export function inputLike(name: string, { dtype, shape }: TensorData): Tensor {
  return input(name, dtype, shape);
}

/** Largest absolute difference of two tensors' values; infinite when sizes differ. */
export function maxDifference(
  a: { data: ArrayLike<number | bigint> },
  b: { data: ArrayLike<number | bigint> },
): number {
  if (a.data.length !== b.data.length) return Number.POSITIVE_INFINITY;
  let largest = 0;
  for (let i = 0; i < a.data.length; i++) {
    const difference = Math.abs(Number(a.data[i]) - Number(b.data[i]));
    if (!(difference <= largest)) largest = difference;
  }
  return largest;
}
