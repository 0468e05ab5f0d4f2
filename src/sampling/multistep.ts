/** Samplers that reuse the predictions of earlier steps: higher order at one evaluation a step. None adds noise. */
import {
  combine,
  type Denoiser,
  eulerStep,
  intervals,
  type SamplerOptions,
  type SamplerStep,
  velocityOf,
} from './steps.ts';

/**
 * DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2), as Stability's reference code and ComfyUI run it: on the
 * flow's sigma as if it were that of a variance-exploding process, lambda = -log(sigma).
 */
export async function* dpmpp2m(
  denoise: Denoiser,
  latent: Float32Array,
  sigmas: ArrayLike<number>,
  { signal }: SamplerOptions = {},
): AsyncGenerator<SamplerStep, void> {
  let previous: { denoised: Float32Array; h: number } | undefined;
  for (const interval of intervals(sigmas, signal)) {
    const { sigma, sigmaNext } = interval;
    const denoised = await denoise(latent, sigma);
    const h = Math.log(sigma / sigmaNext);
    let extrapolated = denoised;
    if (previous && sigmaNext > 0) {
      const slope = h / previous.h / 2;
      extrapolated = combine([1 + slope, denoised], [-slope, previous.denoised]);
    }
    latent = eulerStep(latent, extrapolated, sigma, sigmaNext);
    previous = { denoised, h };
    yield { ...interval, latent, denoised };
  }
}

/**
 * The second-order multistep method of the refined exponential solver (Zhang et al., arXiv 2308.02157), in
 * lambda = -log(sigma).
 */
export async function* resMultistep(
  denoise: Denoiser,
  latent: Float32Array,
  sigmas: ArrayLike<number>,
  { signal }: SamplerOptions = {},
): AsyncGenerator<SamplerStep, void> {
  let previous: { denoised: Float32Array; sigma: number } | undefined;
  for (const interval of intervals(sigmas, signal)) {
    const { sigma, sigmaNext } = interval;
    const denoised = await denoise(latent, sigma);
    if (previous && sigmaNext > 0) {
      const h = Math.log(sigma / sigmaNext);
      /** Where the previous prediction lies, in steps from here: negative. */
      const c2 = Math.log(sigma / previous.sigma) / h;
      const phi1 = Math.expm1(-h) / -h;
      const phi2 = (phi1 - 1) / -h;
      latent = combine(
        [sigmaNext / sigma, latent],
        [h * (phi1 - phi2 / c2), denoised],
        [(h * phi2) / c2, previous.denoised],
      );
    } else {
      latent = eulerStep(latent, denoised, sigma, sigmaNext);
    }
    previous = { denoised, sigma };
    yield { ...interval, latent, denoised };
  }
}

/** Adams-Bashforth weights for equal steps, newest velocity first, by order. */
const adamsBashforth: readonly (readonly number[])[] = [
  [1],
  [3 / 2, -1 / 2],
  [23 / 12, -16 / 12, 5 / 12],
  [55 / 24, -59 / 24, 37 / 24, -9 / 24],
];

/**
 * Improved pseudo numerical method (Zhang & Chen, arXiv 2204.13902): Adams-Bashforth of up to fourth order
 * on the velocity, with the weights for equal steps whatever the schedule.
 */
export async function* ipndm(
  denoise: Denoiser,
  latent: Float32Array,
  sigmas: ArrayLike<number>,
  { signal }: SamplerOptions = {},
): AsyncGenerator<SamplerStep, void> {
  let velocities: Float32Array[] = [];
  for (const interval of intervals(sigmas, signal)) {
    const { sigma, sigmaNext } = interval;
    const denoised = await denoise(latent, sigma);
    velocities = [velocityOf(latent, denoised, sigma), ...velocities].slice(0, adamsBashforth.length);
    if (sigmaNext === 0) {
      latent = denoised;
    } else {
      const weights = adamsBashforth[velocities.length - 1]!;
      const change = sigmaNext - sigma;
      latent = combine([1, latent], ...velocities.map((velocity, j) => [change * weights[j]!, velocity] as const));
    }
    yield { ...interval, latent, denoised };
  }
}

/** Highest order of `deis`: three velocities (ComfyUI's default). */
const DEIS_MAX_ORDER = 3;

/**
 * Diffusion exponential integrator sampler, tAB-DEIS (Zhang & Chen, arXiv 2204.13902): the velocity is extrapolated by
 * the polynomial through the last three, in the time of a variance-preserving process of the same sigma.
 */
export async function* deis(
  denoise: Denoiser,
  latent: Float32Array,
  sigmas: ArrayLike<number>,
  { signal }: SamplerOptions = {},
): AsyncGenerator<SamplerStep, void> {
  let history: { sigma: number; velocity: Float32Array }[] = [];
  for (const interval of intervals(sigmas, signal)) {
    const { sigma, sigmaNext } = interval;
    const denoised = await denoise(latent, sigma);
    history = [{ sigma, velocity: velocityOf(latent, denoised, sigma) }, ...history].slice(0, DEIS_MAX_ORDER);
    if (sigmaNext === 0) {
      latent = denoised;
    } else {
      const weights = deisWeights(
        history.map((entry) => entry.sigma),
        sigmaNext,
      );
      latent = combine([1, latent], ...history.map(({ velocity }, j) => [weights[j]!, velocity] as const));
    }
    yield { ...interval, latent, denoised };
  }
}

/** The variance-preserving process of DEIS: beta rises linearly, sigma from 0.002 at time 0.001 to 80 at time 1. */
const VP_TIME_MIN = 1e-3;
const VP_LOG_MIN = Math.log(0.002 ** 2 + 1);
const VP_LOG_MAX = Math.log(80 ** 2 + 1);
const VP_BETA_SLOPE = (2 * (VP_LOG_MIN / VP_TIME_MIN - VP_LOG_MAX)) / (VP_TIME_MIN - 1);
const VP_BETA_MIN = VP_LOG_MAX - VP_BETA_SLOPE / 2;

/** The time at which that process has reached a sigma: log(sigma^2 + 1) = slope t^2 / 2 + min t, solved for t. */
function vpTime(sigma: number): number {
  return (Math.sqrt(VP_BETA_MIN ** 2 + 2 * VP_BETA_SLOPE * Math.log(sigma ** 2 + 1)) - VP_BETA_MIN) / VP_BETA_SLOPE;
}

/** Even number of Simpson intervals; the integrands below are polynomials in a smooth function of sigma. */
const SIMPSON_INTERVALS = 64;

/**
 * The weight of each past velocity in a step from `past[0]` to `sigmaNext`: the integral over sigma of the Lagrange
 * polynomial in time that is 1 at that velocity and 0 at the others.
 */
function deisWeights(past: readonly number[], sigmaNext: number): number[] {
  const times = past.map(vpTime);
  const width = (sigmaNext - past[0]!) / SIMPSON_INTERVALS;
  const weights = past.map(() => 0);
  for (let i = 0; i <= SIMPSON_INTERVALS; i++) {
    const time = vpTime(past[0]! + i * width);
    const simpson = (width / 3) * (i === 0 || i === SIMPSON_INTERVALS ? 1 : i % 2 ? 4 : 2);
    for (const [j, own] of times.entries()) {
      let lagrange = 1;
      for (const [k, other] of times.entries()) if (k !== j) lagrange *= (time - other) / (own - other);
      weights[j]! += simpson * lagrange;
    }
  }
  return weights;
}

/** How far `gradient_estimation` goes beyond the newest velocity, away from the one before it. */
const GRADIENT_ESTIMATION_GAMMA = 2;

/** Euler's method on an estimate of the velocity from the last two (Permenter & Yuan, arXiv 2306.04848). */
export async function* gradientEstimation(
  denoise: Denoiser,
  latent: Float32Array,
  sigmas: ArrayLike<number>,
  { signal }: SamplerOptions = {},
): AsyncGenerator<SamplerStep, void> {
  let previous: Float32Array | undefined;
  for (const interval of intervals(sigmas, signal)) {
    const { sigma, sigmaNext } = interval;
    const denoised = await denoise(latent, sigma);
    const velocity = velocityOf(latent, denoised, sigma);
    const change = sigmaNext - sigma;
    if (sigmaNext === 0 || !previous) {
      latent = eulerStep(latent, denoised, sigma, sigmaNext);
    } else {
      latent = combine(
        [1, latent],
        [change * GRADIENT_ESTIMATION_GAMMA, velocity],
        [change * (1 - GRADIENT_ESTIMATION_GAMMA), previous],
      );
    }
    previous = velocity;
    yield { ...interval, latent, denoised };
  }
}
