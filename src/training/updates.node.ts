/**
 * AdamW in two threads: with some million parameters it takes a fifth of a step, in which all processors but one would
 * wait. Arrays are handed over to the other thread and back, not copied.
 */

import { Worker } from 'node:worker_threads';
import { adamwStep, squaredNorm } from './adamw.ts';
import {
  type ParameterState,
  plainUpdater,
  sumOfSquares,
  type UpdateOptions,
  type Updater,
  updateAll,
} from './updates.ts';

/** Fewer parameters are done before another thread has woken up. */
const WORTH_A_THREAD = 2 ** 20;

/** What the other thread is asked, and answers. */
type Request =
  | { readonly gradients: readonly Float32Array[] }
  | { readonly states: readonly ParameterState[]; readonly options: UpdateOptions; readonly norm: number };
type Reply = { readonly sum: number } | { readonly states: readonly ParameterState[] };

/** An updater with a thread of its own, which ends with the process. */
export function threadedUpdater(): Updater {
  let worker: Worker | undefined;
  const ask = (request: Request, arrays: readonly Float32Array[]): Promise<Reply> => {
    worker ??= startWorker();
    const { promise, resolve, reject } = promiseParts<Reply>();
    const thread = worker;
    thread.once('message', resolve);
    thread.once('error', reject);
    thread.postMessage(
      request,
      arrays.map(({ buffer }) => buffer as ArrayBuffer),
    );
    return promise.finally(() => thread.off('message', resolve).off('error', reject));
  };

  return {
    async update(states, gradients, options) {
      const split = halfway(gradients);
      if (split === undefined || !gradients.slice(split).every(ownsItsBuffer)) {
        return plainUpdater.update(states, gradients, options);
      }
      const theirs = gradients.slice(split);
      const summed = ask({ gradients: theirs }, theirs);
      const own = sumOfSquares(gradients.slice(0, split));
      const { sum } = (await summed) as Extract<Reply, { sum: number }>;
      const norm = Math.sqrt(own + sum);
      if (!options.finite || !Number.isFinite(norm)) return norm;

      const moved = states.slice(split);
      const arrays = moved.flatMap(({ parameter, first, second }) => [parameter, first, second]);
      const plain = moved.map(({ parameter, first, second }) => ({ parameter, first, second }));
      const updated = ask({ states: plain, options, norm }, arrays);
      updateAll(states.slice(0, split), gradients, options, norm);
      const reply = (await updated) as Extract<Reply, { states: readonly ParameterState[] }>;
      for (const [i, state] of moved.entries()) Object.assign(state, reply.states[i]);
      return norm;
    },
  };
}

/** Index of the gradient from which on there is about half of all values; undefined where a thread is not worth it. */
function halfway(gradients: readonly Float32Array[]): number | undefined {
  const total = gradients.reduce((sum, { length }) => sum + length, 0);
  if (total < WORTH_A_THREAD || gradients.length < 2) return undefined;
  let before = 0;
  const index = gradients.findIndex(({ length }) => {
    before += length;
    return before >= total / 2;
  });
  return Math.min(Math.max(index, 1), gradients.length - 1);
}

/** Whether an array can be handed over without others that lie in the same memory. */
function ownsItsBuffer({ buffer, byteLength }: Float32Array): boolean {
  return buffer instanceof ArrayBuffer && buffer.byteLength === byteLength;
}

function promiseParts<T>() {
  let resolve!: (value: T) => void;
  let reject!: (error: Error) => void;
  const promise = new Promise<T>((onValue, onError) => {
    resolve = onValue;
    reject = onError;
  });
  return { promise, resolve, reject };
}

/** Written as text, because a thread cannot load TypeScript by itself. */
function startWorker(): Worker {
  const code = `
    const { parentPort } = require('node:worker_threads');
    const squaredNorm = ${squaredNorm.toString()};
    const adamwStep = ${adamwStep.toString()};
    let gradients;
    parentPort.on('message', (request) => {
      if (request.gradients) {
        gradients = request.gradients;
        parentPort.postMessage({ sum: gradients.reduce((sum, gradient) => sum + squaredNorm(gradient), 0) });
        return;
      }
      const { states, options: { step, learningRate, clip, ...adamw }, norm } = request;
      const scale = norm > clip ? clip / norm : 1;
      for (const [i, state] of states.entries()) {
        adamwStep(state.parameter, gradients[i], state, step, learningRate, adamw, scale);
      }
      const arrays = states.flatMap(({ parameter, first, second }) => [parameter, first, second]);
      parentPort.postMessage({ states }, arrays.map(({ buffer }) => buffer));
      gradients = undefined;
    });
  `;
  // Options of the process, such as loaders, are not for this.
  const worker = new Worker(code, { eval: true, execArgv: [] });
  worker.unref();
  return worker;
}
