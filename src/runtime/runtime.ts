/**
 * Running programs. A runtime compiles a recorded program for a device; what comes out is called with plain
 * tensors. Everything here is shared by Node (`node.node.ts`) and the browser (`web.ts`).
 */

import type { InferenceSession, Tensor as OrtTensor, TensorConstructor } from 'onnxruntime-common';
import { MmditxError } from '../errors.ts';
import {
  type Binding,
  type DType,
  leaves,
  OUTPUT_PREFIX,
  type Program,
  type Tensor,
  type TensorData,
  type TypedArray,
  writeOnnx,
} from '../tensor/index.ts';

/** Where programs run. `cuda` needs ONNX Runtime's CUDA libraries, `dml` Windows, `coreml` macOS. */
export const DEVICES = ['cpu', 'webgpu', 'cuda', 'dml', 'coreml'] as const;
export type Device = (typeof DEVICES)[number];

export interface RunOptions {
  /** Rejects before the program starts; a program that has started runs to its end. */
  signal?: AbortSignal | undefined;
}

/** A compiled program. It holds its weights until it is disposed of. */
export interface Executable {
  /** Runs with a value for every input; gives every output. Throws on missing inputs and wrong shapes. */
  run(inputs: Readonly<Record<string, TensorData>>, options?: RunOptions): Promise<Record<string, TensorData>>;
  /** Gives the memory back. The executable cannot run afterwards. */
  dispose(): Promise<void>;
}

/** The bytes of a file that weights are bound to, found by the name the bindings use. */
export interface WeightFile {
  readonly name: string;
  /** Path on disk: the runtime maps the file. Node only. */
  readonly path?: string;
  /** The whole file in memory, where there is no disk. */
  readonly bytes?: Uint8Array;
}

export interface CompileOptions {
  /** Where each parameter's value comes from. */
  bind(parameter: Tensor): Binding;
  /** Files that bindings refer to. */
  files?: readonly WeightFile[];
  /** Writes ONNX Runtime's profile (JSON) to a file that starts with this, when the executable is disposed of. */
  profile?: string;
}

export interface Runtime {
  readonly device: Device;
  compile(program: Program, options: CompileOptions): Promise<Executable>;
}

/** What differs between Node and the browser. */
export interface Engine {
  readonly device: Device;
  readonly Tensor: TensorConstructor;
  createSession(model: Uint8Array, options: CompileOptions): Promise<InferenceSession>;
}

/** A runtime on an ONNX Runtime binding. */
export function createRuntime(engine: Engine): Runtime {
  return {
    device: engine.device,
    async compile(program, options) {
      const session = await engine.createSession(writeOnnx(program, options.bind), options);
      const trained = leaves(program).parameters.filter((tensor) => options.bind(tensor) === 'input');
      return executable(engine, session, [...leaves(program).inputs, ...trained], options);
    },
  };
}

function executable(
  { Tensor }: Engine,
  session: InferenceSession,
  inputs: readonly Tensor[],
  { profile }: CompileOptions,
): Executable {
  const expected = new Map(inputs.map((tensor) => [tensor.name!, tensor]));
  let disposed = false;
  return {
    async run(values, { signal } = {}) {
      signal?.throwIfAborted();
      if (disposed) throw new MmditxError('bad-option', 'This model has been disposed of; load it again.');
      const feeds: Record<string, OrtTensor> = {};
      for (const [name, tensor] of expected) {
        const value = values[name];
        if (!value) throw new MmditxError('bad-option', `The program needs a value for its input "${name}".`);
        checkFits(name, tensor, value);
        feeds[name] = toOrt(Tensor, value);
      }
      const results = await session.run(feeds);
      return Object.fromEntries(
        Object.entries(results).map(([name, result]) => [name.slice(OUTPUT_PREFIX.length), fromOrt(result as OrtTensor)]),
      );
    },
    async dispose() {
      if (disposed) return;
      disposed = true;
      if (profile) session.endProfiling();
      await session.release();
    },
  };
}

function checkFits(name: string, tensor: Tensor, value: TensorData): void {
  const fits =
    value.dtype === tensor.dtype &&
    value.shape.length === tensor.shape.length &&
    tensor.shape.every((size, axis) => typeof size !== 'number' || size === value.shape[axis]);
  if (!fits) {
    const wanted = tensor.shape.map((size) => (typeof size === 'number' ? size : '*')).join('x');
    throw new MmditxError(
      'bad-option',
      `Input "${name}" is ${value.dtype} ${value.shape.join('x')}; the program takes ${tensor.dtype} ${wanted}.`,
    );
  }
}

function toOrt(Tensor: TensorConstructor, { dtype, shape, data }: TensorData): OrtTensor {
  return new Tensor(dtype as 'float32', data as Float32Array, [...shape]);
}

function fromOrt(tensor: OrtTensor): TensorData {
  return { dtype: tensor.type as DType, shape: tensor.dims, data: tensor.data as unknown as TypedArray };
}
