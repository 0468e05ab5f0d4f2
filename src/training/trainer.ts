/**
 * One optimiser over one loss: the program of a loss and its gradients, the parameters, AdamW, and the state that a
 * run continues from. What the loss is and where batches come from is for the caller to say.
 */

import type { Weights } from '../models/weights.ts';
import type { Runtime } from '../runtime/runtime.ts';
import { elementCount, type FloatTensor, floats, type TensorData } from '../tensor/data.ts';
import { gradients, leaves, parameter, type Tensor } from '../tensor/index.ts';
import { type AdamWOptions, adamwStep, globalNorm, type Moments, zeroMoments } from './adamw.ts';

/** Parameters being trained, by name. Values change in place. */
export type Parameters = Map<string, FloatTensor>;

/** Weights that {@link createTrainer} trains: each name becomes a parameter of the program. */
export function trainableWeights(): { weights: Weights; parameters: ReadonlyMap<string, Tensor> } {
  const parameters = new Map<string, Tensor>();
  return {
    parameters,
    weights(name, shape) {
      const weight = parameters.get(name) ?? parameter(name, 'float32', shape);
      parameters.set(name, weight);
      return weight;
    },
  };
}

export interface TrainerOptions {
  /** What is minimised, a scalar. */
  loss: Tensor;
  /** Further scalars to report. */
  metrics?: Readonly<Record<string, Tensor>>;
  /** Initial values; a parameter of the loss without a value is an error. */
  values: Parameters;
  /** Names of parameters that keep their values (default none). */
  frozen?: (name: string) => boolean;
  optimizer?: AdamWOptions;
  /** Largest global norm of the gradients; larger ones are scaled down (default 1). */
  clip?: number;
  /** Decay of an exponential moving average of the parameters at each of its updates (default none). */
  averageDecay?: number;
  /** Steps between two updates of the average (default 1; SD3's ablations: 100, with a decay of 0.99). */
  averageEvery?: number;
}

export interface StepReport {
  /** Steps taken so far. */
  readonly step: number;
  readonly loss: number;
  /** Global norm of the gradients before clipping. */
  readonly norm: number;
  readonly metrics: Readonly<Record<string, number>>;
}

export interface Trainer {
  /** One step on a batch. Throws a RangeError when the loss is not finite; the parameters are then unchanged. */
  step(batch: Readonly<Record<string, TensorData>>, learningRate: number): Promise<StepReport>;
  readonly parameters: Parameters;
  /** The moving average, or the parameters themselves without one. */
  readonly average: Parameters;
  /** Everything a later run needs to go on as if never stopped. */
  state(): Map<string, TensorData>;
  restore(state: ReadonlyMap<string, TensorData>): void;
  dispose(): Promise<void>;
}

export async function createTrainer(runtime: Runtime, options: TrainerOptions): Promise<Trainer> {
  const {
    loss,
    metrics = {},
    values,
    frozen = () => false,
    optimizer,
    clip = 1,
    averageDecay,
    averageEvery = 1,
  } = options;
  const all = leaves({ outputs: { loss } }).parameters;
  const missing = all.find(({ name }) => !values.has(name!));
  if (missing) throw new RangeError(`The parameter ${missing.name} has no initial value.`);
  const trained = all.filter(({ name }) => !frozen(name!));
  const names = trained.map(({ name }) => name!);
  const outputs: Record<string, Tensor> = { loss, ...metrics };
  for (const [i, gradient] of gradients(loss, trained).entries()) outputs[`gradient ${names[i]}`] = gradient;
  const executable = await runtime.compile({ outputs }, { bind: () => 'input' });

  const moments = new Map<string, Moments>(names.map((name) => [name, zeroMoments(values.get(name)!.data.length)]));
  const average: Parameters = averageDecay ? new Map(names.map((name) => [name, copyOf(values.get(name)!)])) : values;
  let steps = 0;

  return {
    parameters: values,
    average,
    async step(batch, learningRate) {
      const results = await executable.run({ ...batch, ...parameterInputs(all, values) });
      const scalarOf = (name: string) => Number(results[name]!.data[0]);
      const gradientOf = (name: string) => results[`gradient ${name}`]!.data as Float32Array;
      const norm = globalNorm(names.map(gradientOf));
      if (!Number.isFinite(scalarOf('loss')) || !Number.isFinite(norm)) {
        throw new RangeError(`The loss is ${scalarOf('loss')} with a gradient norm of ${norm} at step ${steps + 1}.`);
      }
      steps++;
      const scale = norm > clip ? clip / norm : 1;
      for (const name of names) {
        const { data } = values.get(name)!;
        adamwStep(data, gradientOf(name), moments.get(name)!, steps, learningRate, optimizer, scale);
        if (averageDecay && steps % averageEvery === 0) {
          const updates = steps / averageEvery;
          follow(average.get(name)!.data, data, Math.min(averageDecay, (1 + updates) / (10 + updates)));
        }
      }
      const reported = Object.fromEntries(Object.keys(metrics).map((name) => [name, scalarOf(name)]));
      return { step: steps, loss: scalarOf('loss'), norm, metrics: reported };
    },
    state() {
      const state = new Map<string, TensorData>();
      state.set('step', { dtype: 'int32', shape: [1], data: Int32Array.of(steps) });
      for (const name of names) {
        const { shape, data } = values.get(name)!;
        const { first, second } = moments.get(name)!;
        state.set(`parameter.${name}`, floats(shape, data));
        state.set(`first.${name}`, floats(shape, first));
        state.set(`second.${name}`, floats(shape, second));
        if (averageDecay) state.set(`average.${name}`, average.get(name)!);
      }
      return state;
    },
    restore(state) {
      const load = (key: string, target: Float32Array) => {
        const stored = state.get(key);
        if (stored?.dtype !== 'float32' || elementCount(stored.shape) !== target.length) {
          throw new RangeError(`The training state has no fitting "${key}"; it belongs to another model.`);
        }
        target.set(stored.data as Float32Array);
      };
      for (const name of names) {
        load(`parameter.${name}`, values.get(name)!.data);
        load(`first.${name}`, moments.get(name)!.first);
        load(`second.${name}`, moments.get(name)!.second);
        if (averageDecay) load(`average.${name}`, average.get(name)!.data);
      }
      steps = Number(state.get('step')!.data[0]);
    },
    dispose: () => executable.dispose(),
  };
}

/** The values of a program's parameters in the shapes it computes with, which need not be those of the file. */
export function parameterInputs(parameters: readonly Tensor[], values: Parameters): Record<string, FloatTensor> {
  return Object.fromEntries(
    parameters.map(({ name, shape }) => [name!, floats(shape as number[], values.get(name!)!.data)]),
  );
}

function copyOf({ shape, data }: FloatTensor): FloatTensor {
  return floats(shape, data.slice());
}

/** Moves an average towards new values: average = decay * average + (1 - decay) * value. */
function follow(average: Float32Array, values: Float32Array, decay: number): void {
  for (let i = 0; i < average.length; i++) average[i] = decay * average[i]! + (1 - decay) * values[i]!;
}
