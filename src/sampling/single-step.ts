/** Samplers that forget everything between steps and add no noise. */
import {
  combine,
  type Denoiser,
  eulerStep,
  intervals,
  type SamplerOptions,
  type SamplerStep,
  velocityOf,
} from './steps.ts';

/** Euler's method: one evaluation a step, first order. */
export async function* euler(
  denoise: Denoiser,
  latent: Float32Array,
  sigmas: ArrayLike<number>,
  { signal }: SamplerOptions = {},
): AsyncGenerator<SamplerStep, void> {
  for (const interval of intervals(sigmas, signal)) {
    const { sigma, sigmaNext } = interval;
    const denoised = await denoise(latent, sigma);
    latent = eulerStep(latent, denoised, sigma, sigmaNext);
    yield { ...interval, latent, denoised };
  }
}

/**
 * Heun's method: an Euler step, then the mean of the slopes at both ends. Two evaluations a step but for the last,
 * second order (Karras et al., arXiv 2206.00364, algorithm 1).
 */
export async function* heun(
  denoise: Denoiser,
  latent: Float32Array,
  sigmas: ArrayLike<number>,
  { signal }: SamplerOptions = {},
): AsyncGenerator<SamplerStep, void> {
  for (const interval of intervals(sigmas, signal)) {
    const { sigma, sigmaNext } = interval;
    const denoised = await denoise(latent, sigma);
    const predicted = eulerStep(latent, denoised, sigma, sigmaNext);
    if (sigmaNext === 0) {
      latent = predicted;
    } else {
      const velocity = velocityOf(latent, denoised, sigma);
      const velocityNext = velocityOf(predicted, await denoise(predicted, sigmaNext), sigmaNext);
      const half = (sigmaNext - sigma) / 2;
      latent = combine([1, latent], [half, velocity], [half, velocityNext]);
    }
    yield { ...interval, latent, denoised };
  }
}

/**
 * The midpoint method, with the midpoint taken in log(sigma). Two evaluations a step but for the last, second order
 * (after DPM-Solver-2, Lu et al., arXiv 2206.00927).
 */
export async function* dpm2(
  denoise: Denoiser,
  latent: Float32Array,
  sigmas: ArrayLike<number>,
  { signal }: SamplerOptions = {},
): AsyncGenerator<SamplerStep, void> {
  for (const interval of intervals(sigmas, signal)) {
    const { sigma, sigmaNext } = interval;
    const denoised = await denoise(latent, sigma);
    if (sigmaNext === 0) {
      latent = denoised;
    } else {
      const sigmaMiddle = Math.sqrt(sigma * sigmaNext);
      const middle = eulerStep(latent, denoised, sigma, sigmaMiddle);
      const velocity = velocityOf(middle, await denoise(middle, sigmaMiddle), sigmaMiddle);
      latent = combine([1, latent], [sigmaNext - sigma, velocity]);
    }
    yield { ...interval, latent, denoised };
  }
}
