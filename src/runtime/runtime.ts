/**
 * Running programs. A runtime compiles a recorded program for a device; what comes out is called with plain
 * tensors. Everything here is shared by Node (`node.node.ts`) and the browser (`web.ts`).
 */

import type { InferenceSession, Tensor as OrtTensor, TensorConstructor } from 'onnxruntime-common';
import { MmditxError } from '../errors.ts';
import {
  absolute,
  add,
  attention,
  type Binding,
  type Dimension,
  type DType,
  floats,
  input,
  leaves,
  matmul,
  matmulTransposed,
  mean,
  type OnnxModel,
  type OnnxOptions,
  OUTPUT_PREFIX,
  type Program,
  reshape,
  shapeText,
  softmax,
  subtract,
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
  /** Gives the memory back once runs in progress have ended. The executable cannot run afterwards. */
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
  /**
   * Whether weights in 16 bits or less become float32 once and stay so (default), which is fastest, or at each run,
   * which leaves them where they are mapped.
   */
  expandWeights?: boolean | undefined;
  /**
   * Whether the processor's products get weights in the order they like best, a copy made while compiling (default), or
   * take them from where they are mapped: better for a program that runs once, or where memory is short.
   */
  packWeights?: boolean | undefined;
  /**
   * Whether the memory of intermediate results is kept for the next run (default), or given back at once: slower by about
   * a tenth, and less where several programs follow each other.
   */
  keepBuffers?: boolean | undefined;
  /** Writes ONNX Runtime's profile (JSON) to a file that starts with this, when the executable is disposed of. */
  profile?: string;
}

export interface Runtime {
  readonly device: Device;
  /**
   * Makes sure that the device works, which the first compilation does otherwise.
   * @throws MmditxError `device-unavailable` with what the device needs
   */
  check(): Promise<void>;
  /** @throws MmditxError `device-unavailable` with what the device needs */
  compile(program: Program, options: CompileOptions): Promise<Executable>;
}

/** What a program needs of ONNX Runtime's session. */
export type Session = Pick<InferenceSession, 'run' | 'release' | 'endProfiling'>;

/** What differs between Node and the browser. */
export interface Engine {
  readonly device: Device;
  readonly Tensor: TensorConstructor;
  /** What the device needs, in a sentence that ends the message when it cannot be used. */
  readonly remedy: string;
  createSession(model: OnnxModel, options: CompileOptions): Promise<Session>;
}

/** A runtime on an ONNX Runtime binding. */
export function createRuntime(engine: Engine): Runtime {
  let tried: Promise<OnnxOptions> | undefined;
  const tryOnce = () => {
    tried ??= tryDevice(engine);
    return tried;
  };
  return {
    device: engine.device,
    async check() {
      await tryOnce();
    },
    async compile(program, options) {
      return compile(engine, program, options, await tryOnce());
    },
  };
}

async function compile(
  engine: Engine,
  program: Program,
  options: CompileOptions,
  onnx: OnnxOptions,
): Promise<Executable> {
  const session = await engine.createSession(writeOnnx(program, options.bind, onnx), options);
  const { inputs, parameters } = leaves(program);
  const trained = parameters.filter((tensor) => options.bind(tensor) === 'input');
  return executable(engine, session, [...inputs, ...trained], options);
}

/** Tokens of the trial: the flash attention kernel of ONNX Runtime's WebGPU starts at 32 queries. */
const TRIAL_TOKENS = 40;
const TRIAL_WIDTH = 8;
/** Mean error: above 0.012 with the fault (see {@link tryDevice}), below 1e-3 even where a GPU rounds products to TF32. */
const TRIAL_TOLERANCE = 3e-3;

/**
 * Runs a small program, which tells a missing device from a faulty model, and a device's attention from its
 * definition: the WebGPU kernel of ONNX Runtime 1.30 counts keys twice where a subgroup has only four lanes (software
 * adapters such as SwiftShader, some phones), and says nothing.
 */
async function tryDevice(engine: Engine): Promise<OnnxOptions> {
  const shape = [1, TRIAL_TOKENS, TRIAL_WIDTH];
  const x = input('x', 'float32', shape);
  const bias = input('bias', 'float32', [1, 1, TRIAL_TOKENS, TRIAL_TOKENS]);
  const logits = add(matmulTransposed(x, x), reshape(bias, [1, TRIAL_TOKENS, TRIAL_TOKENS]));
  const difference = subtract(attention(x, x, x, { heads: 1, scale: 1, bias }), matmul(softmax(logits), x));
  const values = (length: number) => Float32Array.from({ length }, (_, i) => Math.sin(i));
  try {
    const program = await compile(
      engine,
      { outputs: { error: mean(absolute(difference)) } },
      { bind: () => 'input' },
      {},
    );
    const { error } = await program.run({
      x: floats(shape, values(TRIAL_TOKENS * TRIAL_WIDTH)),
      bias: floats([1, 1, TRIAL_TOKENS, TRIAL_TOKENS], values(TRIAL_TOKENS ** 2)),
    });
    await program.dispose();
    return { fusedAttention: Number(error!.data[0]) < TRIAL_TOLERANCE, cpu: engine.device === 'cpu' };
  } catch (cause) {
    throw unavailable(engine.device, engine.remedy, cause);
  }
}

/**
 * WebGPU with a program's look-ups left to the processor: the tables of embeddings and positions are larger than all
 * that is read of them, and float16, which a shader cannot read on every adapter.
 */
export function webgpuProvider(lookups: readonly string[]): InferenceSession.WebGpuExecutionProviderOption {
  // ONNX Runtime refuses an empty list.
  return { name: 'webgpu', ...(lookups.length > 0 && { forceCpuNodeNames: lookups }) };
}

export function unavailable(device: Device, remedy: string, cause?: unknown): MmditxError {
  return new MmditxError('device-unavailable', `Device "${device}" cannot be used here. ${remedy}`, { cause });
}

function executable(
  { Tensor }: Engine,
  session: Session,
  inputs: readonly Tensor[],
  { profile }: CompileOptions,
): Executable {
  const expected = new Map(inputs.map((tensor) => [tensor.name!, tensor]));
  const running = new Set<Promise<unknown>>();
  let disposed = false;
  return {
    async run(values, { signal } = {}) {
      signal?.throwIfAborted();
      if (disposed) throw new MmditxError('bad-option', 'This model has been disposed of; load it again.');
      const feeds: Record<string, OrtTensor> = {};
      const symbols = new Map<string, number>();
      for (const [name, tensor] of expected) {
        const value = values[name];
        if (!value) throw new MmditxError('bad-option', `The program needs a value for its input "${name}".`);
        checkFits(name, tensor, value, symbols);
        feeds[name] = toOrt(Tensor, value);
      }
      const run = session.run(feeds);
      running.add(run);
      const results = await run.finally(() => running.delete(run));
      return Object.fromEntries(
        Object.entries(results).map(([name, result]) => [
          name.slice(OUTPUT_PREFIX.length),
          fromOrt(result as OrtTensor),
        ]),
      );
    },
    async dispose() {
      if (disposed) return;
      disposed = true;
      await Promise.allSettled(running);
      if (profile) session.endProfiling();
      await session.release();
    },
  };
}

/** @param symbols sizes that inputs before this one have given to symbolic dimensions */
function checkFits(name: string, tensor: Tensor, value: TensorData, symbols: Map<string, number>): void {
  const fits =
    value.dtype === tensor.dtype &&
    value.shape.length === tensor.shape.length &&
    tensor.shape.every((dimension, axis) => sizeFits(dimension, value.shape[axis]!, symbols));
  if (fits) return;
  const given = tensor.shape.flatMap((dimension) => (typeof dimension === 'number' ? [] : [...dimension.terms.keys()]));
  const known = [...new Set(given)].filter((symbol) => symbols.has(symbol));
  const where =
    known.length > 0 ? `, where ${known.map((symbol) => `${symbol} is ${symbols.get(symbol)}`).join(', ')}` : '';
  throw new MmditxError(
    'bad-option',
    `Input "${name}" is ${value.dtype} ${shapeText(value.shape)}; ` +
      `the program takes ${tensor.dtype} ${shapeText(tensor.shape)}${where}.`,
  );
}

/** Whether a size is what the program says; a multiple of one symbol says what the symbol is, sums are trusted. */
function sizeFits(dimension: Dimension, size: number, symbols: Map<string, number>): boolean {
  if (typeof dimension === 'number') return dimension === size;
  const [[symbol, factor], ...more] = [...dimension.terms] as [[string, number], ...unknown[]];
  if (more.length > 0 || symbol.includes('*')) return true;
  if (!symbols.has(symbol) && size % factor === 0) symbols.set(symbol, size / factor);
  return symbols.get(symbol)! * factor === size;
}

function toOrt(Tensor: TensorConstructor, { dtype, shape, data }: TensorData): OrtTensor {
  return new Tensor(dtype as 'float32', data as Float32Array, [...shape]);
}

function fromOrt({ type, dims, data }: OrtTensor): TensorData {
  const values = data as unknown as TypedArray;
  // Where the language has a Float16Array, ONNX Runtime gives one instead of the raw bits.
  const raw = type === 'float16' ? new Uint16Array(values.buffer, values.byteOffset, values.length) : values;
  return { dtype: type as DType, shape: dims, data: raw };
}
