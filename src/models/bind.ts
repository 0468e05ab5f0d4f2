/** Binding a checkpoint's weights to a model's program: by their position in the file, without copying them. */

import type { CompileOptions, Executable, Runtime, WeightFile } from '../runtime/runtime.ts';
import {
  type Binding,
  cast,
  concat,
  dequantize,
  elementCount,
  type FloatTensor,
  lowRankSum,
  multiply,
  type Program,
  parameter,
  ShapeError,
  type Tensor,
  type TensorData,
  toFloat16,
} from '../tensor/index.ts';
import type { PartWeights } from '../weights/checkpoint.ts';
import type { ByteSource } from '../weights/safetensors.ts';
import { equalParts, isBlockType, readFloats, type Span, type WeightTensor } from '../weights/stored.ts';
import type { Weights } from './weights.ts';

/** A change of a weight [out, in]: `up @ down` is added to it (`weights/lora.ts`). */
export interface LowRankChange {
  /** [out, rank] */
  readonly up: FloatTensor;
  /** [rank, in] */
  readonly down: FloatTensor;
}

/** How a network is loaded. */
export interface NetworkOptions extends Pick<CompileOptions, 'expandWeights' | 'packWeights' | 'keepBuffers'> {
  /** Whole files by name, where the checkpoint's sources have no path (in a browser). */
  readonly bytes?: ReadonlyMap<string, Uint8Array> | undefined;
  /** Put before the parameters' names, where several networks share a program (default nothing). */
  readonly label?: string | undefined;
  /** Changes of weights by name. */
  readonly changes?: ReadonlyMap<string, LowRankChange> | undefined;
}

export interface BoundWeights extends CompileOptions {
  readonly weights: Weights;
  /** The files that the weights lie in. */
  readonly sources: readonly ByteSource[];
  /** Reads what cannot be used where it lies in the file; to be awaited before the program is compiled. */
  read(): Promise<void>;
}

/** Compiles a program that was recorded with bound weights. */
export async function compileBound(runtime: Runtime, program: Program, bound: BoundWeights): Promise<Executable> {
  // A file that became shorter while it is mapped would end the process without a word.
  await Promise.all(bound.sources.map((source) => source.requireUnchanged?.()));
  await bound.read();
  return runtime.compile(program, bound);
}

/** The weights of one network for recording and compiling its program. */
export function bindWeights(
  part: PartWeights<unknown>,
  { bytes, changes, label = '', ...compile }: NetworkOptions = {},
): BoundWeights {
  const recorded = new Map<string, Tensor>();
  const files = new Map<string, WeightFile>();
  const bindings = new Map<string, Binding>();
  const unread = new Map<string, Span>();

  /** A parameter that stands for values in a file. */
  const parameterAt = (weight: string, span: Span, shape: readonly number[]): Tensor => {
    const name = label + weight;
    if (isBlockType(span.encoding)) {
      unread.set(name, span);
      return parameter(name, 'float16', shape);
    }
    const { path, name: sourceName } = span.source;
    const file = path === undefined ? sourceName : path.slice(path.search(/[^/\\]*$/));
    const content = bytes?.get(sourceName);
    files.set(file, { name: file, ...(path !== undefined && { path }), ...(content && { bytes: content }) });
    bindings.set(name, { file, offset: span.offset, byteLength: span.byteLength });
    return parameter(name, span.encoding, shape);
  };
  const floatingPoint = (name: string, { spans }: WeightTensor, shape: readonly number[]): Tensor => {
    const [, ...rest] = shape;
    const pieces = spans.map((span, i) => {
      const whole = spans.length === 1;
      const rows = whole ? shape : [elementCount(span.shape) / elementCount(rest), ...rest];
      const values = cast(parameterAt(whole ? name : `${name}.${i}`, span, rows), 'float32');
      // What is read in blocks comes scaled.
      return span.scale === undefined || isBlockType(span.encoding) ? values : multiply(values, span.scale);
    });
    return pieces.length === 1 ? pieces[0]! : concat(pieces, 0);
  };
  const integers = (name: string, { spans, quantized }: WeightTensor): Tensor => {
    const { precision, scales } = quantized!;
    const pieces = spans.map((span, i) =>
      dequantize(
        precision,
        parameterAt(`${name}.${i}`, span, span.shape),
        parameterAt(`${name}.scale.${i}`, scales[i]!, scales[i]!.shape),
      ),
    );
    return concat(pieces, 0);
  };
  /** A bias in as many parts as the weight beside it has, so that each product adds its own. */
  const cutLike = (name: string, bias: WeightTensor): WeightTensor => {
    const parts = part.tensors.get(name.replace(/\.bias$/, '.weight'))?.spans.length ?? 1;
    const [span, ...more] = bias.spans as [Span, ...Span[]];
    const cuttable = name.endsWith('.bias') && more.length === 0 && !isBlockType(span.encoding);
    if (!cuttable || parts === 1 || bias.shape[0]! % parts !== 0) return bias;
    return { ...bias, spans: equalParts(span, [bias.shape[0]! / parts], parts) };
  };
  const changed = (name: string, base: Tensor, { up, down }: LowRankChange): Tensor => {
    const [left, right] = [up, down].map((factor, i) => {
      const factorName = `${label}${name}.${i === 0 ? 'up' : 'down'}`;
      bindings.set(factorName, factor);
      return parameter(factorName, 'float32', factor.shape);
    }) as [Tensor, Tensor];
    return lowRankSum(base, left, right);
  };
  const weights: Weights = (name, shape) => {
    const known = recorded.get(name);
    if (known) return known;
    const weight = part.tensors.get(name);
    if (!weight || elementCount(weight.shape) !== elementCount(shape)) {
      throw new ShapeError(`The network asks for ${name} [${shape.join(', ')}], which ${part.file} does not have.`);
    }
    const base = weight.quantized ? integers(name, weight) : floatingPoint(name, cutLike(name, weight), shape);
    const change = changes?.get(name);
    const tensor = change ? changed(name, base, change) : base;
    recorded.set(name, tensor);
    return tensor;
  };
  return {
    ...compile,
    weights,
    bind: (tensor) => bindings.get(tensor.name!)!,
    sources: [...new Set([...part.tensors.values()].flatMap(({ spans }) => spans.map(({ source }) => source)))],
    get files() {
      return [...files.values()];
    },
    async read() {
      for (const [name, span] of unread) {
        const { shape, data } = await readFloats({ name: span.name, shape: span.shape, spans: [span] });
        const halves: TensorData = { dtype: 'float16', shape, data: toFloat16(data) };
        bindings.set(name, halves);
      }
      unread.clear();
    },
  };
}
