/**
 * Loss and gradients of a batch, by one program, or by a chain of segments whose insides are computed again on the way
 * back instead of being kept (gradient checkpointing; Chen et al. 2016, arXiv 1604.06174).
 */

import type { CompileOptions, Executable, Runtime } from '../runtime/runtime.ts';
import { elementCount, type FloatTensor, floats, type TensorData } from '../tensor/data.ts';
import { add, gradients, input, leaves, multiply, type Program, scalar, sum, type Tensor } from '../tensor/index.ts';

/** Parameters being trained, by name. Values change in place. */
export type Parameters = Map<string, FloatTensor>;

/** What a program is computed on, by name. */
export type Batch = Readonly<Record<string, TensorData>>;

/**
 * A piece of the computation of a loss. Its inputs are values of the batch, or outputs of the pieces before it by name;
 * outputs that a later piece does not take, and those of the last, are the loss and metrics.
 */
export interface Segment {
  readonly outputs: Readonly<Record<string, Tensor>>;
  /** Binds what is not trained; called for frozen parameters only. */
  readonly compile: CompileOptions;
  /** To be awaited before the segment is compiled (see `models/bind.ts`). */
  prepare?(): Promise<void>;
}

export interface BatchGradients {
  readonly loss: number;
  readonly metrics: Readonly<Record<string, number>>;
  /** By name of the parameter. */
  readonly gradients: ReadonlyMap<string, Float32Array>;
}

export interface GradientSource {
  /** Names of the parameters that gradients are computed for. */
  readonly trained: readonly string[];
  /** Loss and gradients at these values of the trained parameters. */
  compute(batch: Batch, values: Parameters): Promise<BatchGradients>;
  /** The loss alone. */
  loss(batch: Batch, values: Parameters): Promise<number>;
  dispose(): Promise<void>;
}

/** The output of the last segment that is minimised, a scalar. */
export const LOSS = 'loss';

interface Stage {
  readonly forward: Segment;
  /** Gradients of parameters and of inputs from earlier segments; absent where nothing is trained up to here. */
  readonly backward: Program | undefined;
  readonly trained: readonly Tensor[];
  /** Outputs whose gradient the segments behind give. */
  readonly upstream: readonly string[];
}

const GRADIENT = 'gradient ';
const UPSTREAM = 'upstream ';

/**
 * Prepares the computation of gradients.
 * @param segments in the order in which they run; the last gives `loss`
 * @param isTrained whether a parameter, by name, is trained
 * @throws ShapeError where an operation has no gradient rule
 */
export function gradientSource(
  runtime: Runtime,
  segments: readonly Segment[],
  isTrained: (name: string) => boolean,
): GradientSource {
  const stages = differentiate(segments, isTrained);
  const trained = [...new Set(stages.flatMap((stage) => stage.trained.map(({ name }) => name!)))];
  const trainedNames = new Set(trained);
  const compiled = new Map<Program, Promise<Executable>>();
  const get = (program: Program, { compile, prepare }: Segment): Promise<Executable> => {
    const known = compiled.get(program);
    if (known) return known;
    const made = (async () => {
      await prepare?.();
      const bind: CompileOptions['bind'] = (tensor) => (isTrained(tensor.name!) ? 'input' : compile.bind(tensor));
      return runtime.compile(program, { ...compile, files: compile.files ?? [], bind });
    })();
    compiled.set(program, made);
    return made;
  };

  /** Runs the first segments; gives what each of them took, and then what the next one would. */
  const forward = async (batch: Batch, values: Parameters, segmentCount: number): Promise<Batch[]> => {
    const taken: Batch[] = [batch];
    for (const { forward: segment } of stages.slice(0, segmentCount)) {
      const executable = await get(segment, segment);
      const flows = taken.at(-1)!;
      taken.push({ ...flows, ...(await executable.run({ ...flows, ...inputsOf(segment, values, isTrained) })) });
    }
    return taken;
  };

  return {
    trained,
    async compute(batch, values) {
      // The last segment's way back begins with its own way forward.
      const taken = await forward(batch, values, stages.length - 1);
      const found = new Map<string, Float32Array>();
      const upstream = new Map<string, FloatTensor>();
      let loss = Number.NaN;
      let metrics: Record<string, number> = {};
      for (const [i, { forward: segment, backward, upstream: wanted }] of [...stages.entries()].reverse()) {
        if (!backward) break;
        const executable = await get(backward, segment);
        const given: Record<string, TensorData> = {};
        for (const name of wanted) {
          given[UPSTREAM + name] = upstream.get(name)!;
          upstream.delete(name);
        }
        const results = await executable.run({ ...taken[i], ...given, ...inputsOf(backward, values, isTrained) });
        for (const [key, tensor] of Object.entries(results)) {
          if (!key.startsWith(GRADIENT)) {
            if (key === LOSS) loss = Number(tensor.data[0]);
            else metrics = { ...metrics, [key]: Number(tensor.data[0]) };
            continue;
          }
          const name = key.slice(GRADIENT.length);
          const gradient = tensor as FloatTensor;
          if (trainedNames.has(name)) found.set(name, added(found.get(name), gradient.data));
          else upstream.set(name, floats(gradient.shape, added(upstream.get(name)?.data, gradient.data)));
        }
      }
      return { loss, metrics, gradients: found };
    },
    async loss(batch, values) {
      const flows = (await forward(batch, values, stages.length)).at(-1)!;
      return Number(flows[LOSS]!.data[0]);
    },
    async dispose() {
      const all = [...compiled.values()];
      compiled.clear();
      await Promise.all(all.map(async (executable) => (await executable).dispose()));
    },
  };
}

/** Plans the way back, from the last segment to the first that has anything to train. */
function differentiate(segments: readonly Segment[], isTrained: (name: string) => boolean): Stage[] {
  const outputsBefore = segments.map((_, i) => new Set(segments.slice(0, i).flatMap((s) => Object.keys(s.outputs))));
  /** Names of flows that depend on something trained. */
  const live = new Set<string>();
  const liveAt = segments.map((segment, i) => {
    const { inputs, parameters } = leaves(segment);
    const own = parameters.filter(({ name }) => isTrained(name!));
    const flows = inputs.filter(({ name }) => live.has(name!) && outputsBefore[i]!.has(name!));
    const sources = [...own, ...flows];
    for (const [name, output] of Object.entries(segment.outputs)) {
      // What hangs on nothing trained needs no gradient: with a LoRA, the conditioning of all blocks.
      if (dependencies(output, sources).length > 0) live.add(name);
      else live.delete(name);
    }
    return { own, flows };
  });
  const stages: Stage[] = [];
  let upstream = new Set<string>();
  for (const [i, segment] of [...segments.entries()].reverse()) {
    const { own, flows } = liveAt[i]!;
    const last = i === segments.length - 1;
    const wanted = Object.keys(segment.outputs).filter((name) => upstream.has(name));
    const value = last ? segment.outputs[LOSS]! : weightedSum(segment, wanted);
    const targets = value ? [...own, ...flows] : [];
    let backward: Program | undefined;
    const reached: Tensor[] = [];
    if (value && targets.length > 0) {
      const outputs: Record<string, Tensor> = last ? { ...segment.outputs } : {};
      const depends = dependencies(value, targets);
      reached.push(...depends);
      for (const [j, gradient] of gradients(value, depends).entries()) {
        outputs[GRADIENT + depends[j]!.name!] = gradient;
      }
      backward = { outputs };
    }
    // What this segment takes and hands on unchanged keeps the gradient of those behind it only through this one.
    upstream = new Set([...upstream].filter((name) => !wanted.includes(name)));
    for (const { name } of reached.filter((tensor) => flows.includes(tensor))) upstream.add(name!);
    stages.unshift({
      forward: segment,
      backward,
      trained: reached.filter((tensor) => own.includes(tensor)),
      upstream: wanted,
    });
  }
  return stages;
}

/** Sum of the outputs, each times its gradient: the scalar whose gradients are those of the loss. */
function weightedSum({ outputs }: Segment, names: readonly string[]): Tensor | undefined {
  const terms = names.map((name) => {
    const output = outputs[name]!;
    return sum(multiply(output, input(UPSTREAM + name, 'float32', output.shape)));
  });
  return terms.length === 0 ? undefined : terms.reduce((a, b) => add(a, b), scalar(0));
}

/** The tensors among `targets` that a value is computed from. */
function dependencies(value: Tensor, targets: readonly Tensor[]): Tensor[] {
  const { inputs, parameters } = leaves({ outputs: { value } });
  const found = new Set([...inputs, ...parameters]);
  return targets.filter((target) => found.has(target));
}

/** The values of the trained parameters that a program takes, in the shapes it computes with. */
function inputsOf(
  program: Program,
  values: Parameters,
  isTrained: (name: string) => boolean,
): Record<string, FloatTensor> {
  const { parameters } = leaves(program);
  return parameterInputs(
    parameters.filter(({ name }) => isTrained(name!)),
    values,
  );
}

/** The values of a program's parameters in the shapes it computes with, which need not be those of the file. */
export function parameterInputs(parameters: readonly Tensor[], values: Parameters): Record<string, FloatTensor> {
  return Object.fromEntries(
    parameters.map(({ name, shape }) => {
      const value = values.get(name!);
      if (!value || value.data.length !== elementCount(shape as number[])) {
        throw new RangeError(`The parameter ${name} has no value of its shape.`);
      }
      return [name!, floats(shape as number[], value.data)];
    }),
  );
}

function added(sum: Float32Array | undefined, term: Float32Array): Float32Array {
  if (!sum) return term;
  for (let i = 0; i < sum.length; i++) sum[i]! += term[i]!;
  return sum;
}
