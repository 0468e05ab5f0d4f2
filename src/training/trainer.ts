/**
 * The optimiser: gradients of one or several batches to one step of AdamW, the moving average, and the state that a run
 * continues from. What the loss is and where batches come from is for the caller to say.
 */

import { elementCount, type FloatTensor, floats, type TensorData } from '../tensor/data.ts';
import { type AdamWOptions, zeroMoments } from './adamw.ts';
import type { Batch, BatchGradients, GradientSource, Parameters } from './gradients.ts';
import { type ParameterState, plainUpdater, type Updater } from './updates.ts';

export interface TrainerOptions {
  /** Initial values of the parameters, by name; those that `source` trains are replaced as they change. */
  values: Parameters;
  optimizer?: AdamWOptions;
  /** Largest global norm of the gradients; larger ones are scaled down (default 1). */
  clip?: number;
  /** Decay of an exponential moving average of the parameters at each of its updates (default none). */
  averageDecay?: number | undefined;
  /** How steps are computed (default in the calling thread). */
  updater?: Updater | undefined;
  /** Steps between two updates of the average (default 1; SD3's ablations: 100, with a decay of 0.99). */
  averageEvery?: number | undefined;
}

export interface StepReport {
  /** Steps taken so far. */
  readonly step: number;
  /** Mean over the batches of the step. */
  readonly loss: number;
  /** Global norm of the gradients before clipping. */
  readonly norm: number;
  readonly metrics: Readonly<Record<string, number>>;
}

export interface Trainer {
  /**
   * One step on one or several batches, whose gradients are averaged, each batch counting the same.
   * @throws NotFiniteError when a loss or gradient is not finite; the parameters are then unchanged
   */
  step(batches: Batch | AsyncIterable<Batch> | Iterable<Batch>, learningRate: number): Promise<StepReport>;
  readonly steps: number;
  readonly parameters: Parameters;
  /** The moving average, or the parameters themselves without one. */
  readonly average: Parameters;
  /** Everything a later run needs to go on as if never stopped. */
  state(): Map<string, TensorData>;
  /** @throws RangeError when the state is of other parameters; nothing has changed then */
  restore(state: ReadonlyMap<string, TensorData>): void;
}

/** A loss or gradient became infinite or undefined. */
export class NotFiniteError extends Error {
  override readonly name = 'NotFiniteError';
  readonly step: number;
  constructor(step: number, loss: number, norm: number) {
    super(`the loss is ${loss} with a gradient norm of ${norm}`);
    this.step = step;
  }
}

/** @throws RangeError where a trained parameter has no initial value */
export function createTrainer(source: GradientSource, options: TrainerOptions): Trainer {
  const { values, optimizer, clip = 1, averageDecay, averageEvery = 1, updater = plainUpdater } = options;
  const names = source.trained;
  const missing = names.find((name) => !values.has(name));
  if (missing !== undefined) throw new RangeError(`The parameter ${missing} has no initial value.`);
  const states: ParameterState[] = names.map((name) => {
    const { data } = values.get(name)!;
    return { parameter: data, ...zeroMoments(data.length) };
  });
  const average: Parameters = averageDecay ? new Map(names.map((name) => [name, copyOf(values.get(name)!)])) : values;
  let steps = 0;

  return {
    get steps() {
      return steps;
    },
    parameters: values,
    average,
    async step(batches, learningRate) {
      const { loss, metrics, gradients } = await meanOf(source, severalOf(batches), values);
      const finite = Number.isFinite(loss);
      const norm = await updater.update(
        states,
        names.map((name) => gradients.get(name)!),
        { ...optimizer, step: steps + 1, learningRate, clip, finite },
      );
      if (!finite || !Number.isFinite(norm)) throw new NotFiniteError(steps + 1, loss, norm);
      steps++;
      for (const [i, name] of names.entries()) {
        const { parameter } = states[i]!;
        if (values.get(name)!.data !== parameter) values.set(name, floats(values.get(name)!.shape, parameter));
        if (averageDecay && steps % averageEvery === 0) {
          const updates = steps / averageEvery;
          follow(average.get(name)!.data, parameter, Math.min(averageDecay, (1 + updates) / (10 + updates)));
        }
      }
      return { step: steps, loss, norm, metrics };
    },
    state() {
      const state = new Map<string, TensorData>();
      state.set('step', { dtype: 'int32', shape: [1], data: Int32Array.of(steps) });
      for (const [i, name] of names.entries()) {
        const { shape } = values.get(name)!;
        const { parameter, first, second } = states[i]!;
        state.set(`parameter.${name}`, floats(shape, parameter));
        state.set(`first.${name}`, floats(shape, first));
        state.set(`second.${name}`, floats(shape, second));
        if (averageDecay) state.set(`average.${name}`, average.get(name)!);
      }
      return state;
    },
    restore(state) {
      const loads: [Float32Array, Float32Array][] = [];
      const load = (key: string, target: Float32Array) => {
        const stored = state.get(key);
        if (stored?.dtype !== 'float32' || elementCount(stored.shape) !== target.length) {
          throw new RangeError(`The training state has no fitting "${key}"; it belongs to another model.`);
        }
        loads.push([target, stored.data as Float32Array]);
      };
      for (const [i, name] of names.entries()) {
        load(`parameter.${name}`, states[i]!.parameter);
        load(`first.${name}`, states[i]!.first);
        load(`second.${name}`, states[i]!.second);
        if (averageDecay) load(`average.${name}`, average.get(name)!.data);
      }
      for (const [target, stored] of loads) target.set(stored);
      steps = Number(state.get('step')!.data[0]);
    },
  };
}

function severalOf(batches: Batch | AsyncIterable<Batch> | Iterable<Batch>): AsyncIterable<Batch> | Iterable<Batch> {
  const several = Symbol.asyncIterator in batches || Symbol.iterator in batches;
  return several ? (batches as Iterable<Batch>) : [batches as Batch];
}

/** Means of loss, metrics and gradients over batches. */
async function meanOf(
  source: GradientSource,
  batches: AsyncIterable<Batch> | Iterable<Batch>,
  values: Parameters,
): Promise<BatchGradients> {
  let total: BatchGradients | undefined;
  let count = 0;
  for await (const batch of batches) {
    count++;
    const next = await source.compute(batch, values);
    if (!total) {
      total = next;
      continue;
    }
    const metrics = Object.entries(next.metrics).map(([name, value]) => [name, (total!.metrics[name] ?? 0) + value]);
    for (const [name, gradient] of next.gradients) add(total.gradients.get(name)!, gradient);
    total = { ...total, loss: total.loss + next.loss, metrics: Object.fromEntries(metrics) };
  }
  if (!total) throw new RangeError('A step needs at least one batch.');
  if (count === 1) return total;
  const share = 1 / count;
  for (const gradient of total.gradients.values()) scaleBy(gradient, share);
  const metrics = Object.entries(total.metrics).map(([name, value]) => [name, value * share]);
  return { ...total, loss: total.loss * share, metrics: Object.fromEntries(metrics) };
}

function add(sum: Float32Array, term: Float32Array): void {
  for (let i = 0; i < sum.length; i++) sum[i]! += term[i]!;
}

function scaleBy(values: Float32Array, factor: number): void {
  for (let i = 0; i < values.length; i++) values[i]! *= factor;
}

function copyOf({ shape, data }: FloatTensor): FloatTensor {
  return floats(shape, data.slice());
}

/** Moves an average towards new values: average = decay * average + (1 - decay) * value. */
function follow(average: Float32Array, values: Float32Array, decay: number): void {
  for (let i = 0; i < average.length; i++) average[i] = decay * average[i]! + (1 - decay) * values[i]!;
}
