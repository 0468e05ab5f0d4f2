/**
 * Samplers that replace part of the noise at every step, so that they never settle on one picture as steps grow.
 * With `eta` 0 they add none (`lcm` excepted). Noise is drawn from `options.noise` in the order of use.
 */
import { percentToSigma } from './schedules.ts';
import {
  combine,
  type Denoiser,
  eulerStep,
  intervals,
  type SamplerOptions,
  type SamplerStep,
  stochasticOptions,
} from './steps.ts';

/**
 * Ancestral Euler for rectified flow, as in ComfyUI: an Euler step that goes lower than the next sigma, then
 * new noise up to it, scaled so that signal and noise again add up to a point of the flow.
 */
export async function* eulerAncestral(
  denoise: Denoiser,
  latent: Float32Array,
  sigmas: ArrayLike<number>,
  options: SamplerOptions = {},
): AsyncGenerator<SamplerStep, void> {
  const { noise, signal, eta, noiseScale } = stochasticOptions(options);
  for (const interval of intervals(sigmas, signal)) {
    const { sigma, sigmaNext } = interval;
    const denoised = await denoise(latent, sigma);
    if (sigmaNext === 0) {
      latent = denoised;
    } else {
      const sigmaDown = sigmaNext * (1 + (sigmaNext / sigma - 1) * eta);
      /** Brings the signal's share at `sigmaDown`, 1 - sigmaDown, to that at `sigmaNext`. */
      const signalScale = (1 - sigmaNext) / (1 - sigmaDown);
      const added = Math.sqrt(Math.max(sigmaNext ** 2 - (sigmaDown * signalScale) ** 2, 0));
      latent = eulerStep(latent, denoised, sigma, sigmaDown);
      if (eta > 0) latent = combine([signalScale, latent], [added * noiseScale, noise()]);
    }
    yield { ...interval, latent, denoised };
  }
}

/** Latent consistency sampling (Luo et al., arXiv 2310.04378): the prediction is taken as final and noised anew. */
export async function* lcm(
  denoise: Denoiser,
  latent: Float32Array,
  sigmas: ArrayLike<number>,
  options: SamplerOptions = {},
): AsyncGenerator<SamplerStep, void> {
  const { noise, signal } = stochasticOptions(options);
  for (const interval of intervals(sigmas, signal)) {
    const { sigma, sigmaNext } = interval;
    const denoised = await denoise(latent, sigma);
    latent = sigmaNext === 0 ? denoised : combine([1 - sigmaNext, denoised], [sigmaNext, noise()]);
    yield { ...interval, latent, denoised };
  }
}

/** SDE-DPM-Solver++(2M), with the midpoint form of the second-order term. */
export const dpmpp2mSde = sdeDpmpp2m('midpoint');

/** SDE-DPM-Solver++(2M), with the Heun form of the second-order term. */
export const dpmpp2mSdeHeun = sdeDpmpp2m('heun');

/** SDE-DPM-Solver++(2M) (Lu et al., arXiv 2211.01095) in the flow's half log-SNR, as in ComfyUI. */
function sdeDpmpp2m(form: 'midpoint' | 'heun') {
  return async function* (
    denoise: Denoiser,
    latent: Float32Array,
    sigmas: ArrayLike<number>,
    options: SamplerOptions = {},
  ): AsyncGenerator<SamplerStep, void> {
    const { noise, signal, eta, noiseScale, shift } = stochasticOptions(options);
    let previous: { denoised: Float32Array; h: number } | undefined;
    for (const interval of intervals(belowPureNoise(sigmas, shift), signal)) {
      const { sigma, sigmaNext } = interval;
      const denoised = await denoise(latent, sigma);
      if (sigmaNext === 0) {
        latent = denoised;
      } else {
        const h = halfLogSnr(sigmaNext) - halfLogSnr(sigma);
        const decay = -Math.expm1(-h * (1 + eta));
        const newDenoised = (1 - sigmaNext) * decay;
        latent = combine([(sigmaNext / sigma) * Math.exp(-h * eta), latent], [newDenoised, denoised]);
        if (previous) {
          const curvature = form === 'midpoint' ? newDenoised / 2 : (1 - sigmaNext) * (1 - decay / (h * (1 + eta)));
          const weight = (curvature * h) / previous.h;
          latent = combine([1, latent], [weight, denoised], [-weight, previous.denoised]);
        }
        if (eta > 0) {
          const added = sigmaNext * Math.sqrt(-Math.expm1(-2 * h * eta));
          latent = combine([1, latent], [added * noiseScale, noise()]);
        }
        previous = { denoised, h };
      }
      yield { ...interval, latent, denoised };
    }
  };
}

/** Where in the step `dpmppSde` evaluates a second time, as a share of the way in half log-SNR. */
const DPMPP_SDE_MIDDLE = 1 / 2;

/**
 * DPM-Solver++ (SDE): a stochastic midpoint method in the flow's half log-SNR, as in ComfyUI. Two evaluations and two
 * draws of noise a step but for the last.
 */
export async function* dpmppSde(
  denoise: Denoiser,
  latent: Float32Array,
  sigmas: ArrayLike<number>,
  options: SamplerOptions = {},
): AsyncGenerator<SamplerStep, void> {
  const { noise, signal, eta, noiseScale, shift } = stochasticOptions(options);

  /** From `sigma` to `target` by the exponential integrator, given a constant prediction of x0. */
  function advance(from: Float32Array, sigma: number, predicted: Float32Array, target: number): Float32Array {
    // Noise per unit of signal, the sigma of the equivalent variance-exploding process.
    const [ratio, ratioTarget] = [sigma / (1 - sigma), target / (1 - target)];
    const up = Math.min(ratioTarget, eta * ratioTarget * Math.sqrt(Math.max(1 - (ratioTarget / ratio) ** 2, 0)));
    const kept = Math.sqrt(ratioTarget ** 2 - up ** 2) / ratio;
    const next = combine([((1 - target) / (1 - sigma)) * kept, from], [(1 - target) * (1 - kept), predicted]);
    return eta > 0 ? combine([1, next], [(1 - target) * up * noiseScale, noise()]) : next;
  }

  for (const interval of intervals(belowPureNoise(sigmas, shift), signal)) {
    const { sigma, sigmaNext } = interval;
    const denoised = await denoise(latent, sigma);
    if (sigmaNext === 0) {
      latent = denoised;
    } else {
      const [start, end] = [halfLogSnr(sigma), halfLogSnr(sigmaNext)];
      const sigmaMiddle = 1 / (1 + Math.exp(start + DPMPP_SDE_MIDDLE * (end - start)));
      const middle = advance(latent, sigma, denoised, sigmaMiddle);
      const share = 1 / (2 * DPMPP_SDE_MIDDLE);
      const predicted = combine([1 - share, denoised], [share, await denoise(middle, sigmaMiddle)]);
      latent = advance(latent, sigma, predicted, sigmaNext);
    }
    yield { ...interval, latent, denoised };
  }
}

/** log(signal / noise) of a point of the flow: minus infinity at pure noise. */
function halfLogSnr(sigma: number): number {
  return Math.log((1 - sigma) / sigma);
}

/** How far from pure noise the SDE samplers start, as a share of the way to the image (ComfyUI). */
const FIRST_STEP_PERCENT = 1e-4;

/** The schedule with a first sigma of 1, where the half log-SNR is infinite, moved a little below. */
function belowPureNoise(sigmas: ArrayLike<number>, shift: number): Float32Array {
  const moved = Float32Array.from(sigmas);
  // Thousands of steps put the second sigma above that place; the first must stay above the second.
  if (moved[0]! >= 1) moved[0] = Math.max(percentToSigma(FIRST_STEP_PERCENT, shift), (1 + moved[1]!) / 2);
  return moved;
}
