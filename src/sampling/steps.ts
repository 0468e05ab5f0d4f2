/** What all samplers share: the interface, the walk down a schedule, and the arithmetic on latents. */
import { MmditxError } from '../errors.ts';
import { DEFAULT_SHIFT } from './schedules.ts';

/** Predicts the noise-free latent (x0) from a noisy one, with guidance applied. Its result is a new array each time. */
export type Denoiser = (latent: Float32Array, sigma: number) => Promise<Float32Array>;

/** One step from `sigma` down to `sigmaNext`. */
export interface Interval {
  /** Which step this is, 1..steps. */
  readonly step: number;
  readonly steps: number;
  readonly sigma: number;
  readonly sigmaNext: number;
}

/** The state after a step. Arrays are not reused by later steps, so they may be kept. */
export interface SamplerStep extends Interval {
  /** The latent at `sigmaNext`; after the last step, where `sigmaNext` is 0, the finished one. */
  readonly latent: Float32Array;
  /** The x0 predicted at the start of the step: a preview of the picture. */
  readonly denoised: Float32Array;
}

export interface SamplerOptions {
  /**
   * Fresh standard normal noise of the latent's size, drawn in order; needed by the samplers of `stochastic.ts` only.
   * `samplerNoise` in `noise.ts` makes one from a seed.
   */
  readonly noise?: () => Float32Array;
  /** Stops before the next step, throwing the signal's reason. */
  readonly signal?: AbortSignal;
  /** How much of each step's noise is drawn anew by the stochastic samplers: 0 none, 1 (default) all of it. */
  readonly eta?: number;
  /** Scales the noise that stochastic samplers add; default 1. */
  readonly noiseScale?: number;
  /** The schedule's timestep shift, which places the first step of the SDE samplers; default 3. */
  readonly shift?: number;
}

/**
 * Walks a latent from pure noise, or a noised image, down the schedule and yields after every step.
 * A schedule of n + 1 sigmas has n steps; the last yield carries the result.
 */
export type Sampler = (
  denoise: Denoiser,
  latent: Float32Array,
  sigmas: ArrayLike<number>,
  options?: SamplerOptions,
) => AsyncGenerator<SamplerStep, void>;

/**
 * The steps of a schedule in turn, each preceded by a look at the signal. A sigma that repeats the one before it makes a
 * step of no length, which is passed over: multistep formulas divide by that length.
 */
export function* intervals(sigmas: ArrayLike<number>, signal: AbortSignal | undefined): Generator<Interval> {
  const steps = sigmas.length - 1;
  for (let i = 0; i < steps; i++) {
    const [sigma, sigmaNext] = [sigmas[i]!, sigmas[i + 1]!];
    if (sigma === sigmaNext) continue;
    signal?.throwIfAborted();
    yield { step: i + 1, steps, sigma, sigmaNext };
  }
}

/** The sum of arrays of one length, each times its weight. */
export function combine(...terms: readonly (readonly [weight: number, values: Float32Array])[]): Float32Array {
  const sum = new Float32Array(terms[0]![1].length);
  for (let i = 0; i < sum.length; i++) {
    let value = 0;
    for (const [weight, values] of terms) value += weight * values[i]!;
    sum[i] = value;
  }
  return sum;
}

/** The velocity noise - x0 at a latent, from the predicted x0: the slope d(latent)/d(sigma) of the flow. */
export function velocityOf(latent: Float32Array, denoised: Float32Array, sigma: number): Float32Array {
  return combine([1 / sigma, latent], [-1 / sigma, denoised]);
}

/** The straight line from a latent at `sigma` through its predicted x0, followed to `sigmaNext`: an Euler step. */
export function eulerStep(latent: Float32Array, denoised: Float32Array, sigma: number, sigmaNext: number) {
  const kept = sigmaNext / sigma;
  return combine([kept, latent], [1 - kept, denoised]);
}

/** The options of a stochastic sampler with their defaults. */
export function stochasticOptions(options: SamplerOptions) {
  const { noise, signal, eta = 1, noiseScale = 1, shift = DEFAULT_SHIFT } = options;
  if (!noise) throw new MmditxError('bad-option', 'This sampler adds noise at every step; pass it a source of noise.');
  return { noise, signal, eta, noiseScale, shift };
}
