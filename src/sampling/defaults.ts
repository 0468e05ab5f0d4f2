/** The settings that the reference implementations recommend or preset for Stable Diffusion 3.5 Medium. */
import type { SkipLayerGuidance } from './guidance.ts';
import type { SamplerName } from './samplers.ts';
import { DEFAULT_SHIFT, type DenoiseRule, type ScheduleName } from './schedules.ts';

export interface SamplingDefaults {
  readonly sampler: SamplerName;
  readonly schedule: ScheduleName;
  readonly shift: number;
  readonly steps: number;
  /** Classifier-free guidance scale. */
  readonly cfg: number;
  /** Skip-layer guidance once it is switched on; none of the references has it on by default. */
  readonly skipLayer: SkipLayerGuidance;
  /** Share of an image that image to image redraws, and how it shortens the schedule. */
  readonly denoise: number;
  readonly denoiseRule: DenoiseRule;
}

/** The blocks whose omission improves anatomy and structure, in all three references. */
const SKIPPED_LAYERS = [7, 8, 9] as const;

/**
 * Stability-AI/sd3.5, `sd3_infer.py`, configuration `sd3.5_medium`. (It also lists a CFG of 4.0 for use with skip-layer
 * guidance, but never applies it.)
 */
export const stabilityDefaults: SamplingDefaults = {
  sampler: 'dpmpp_2m',
  schedule: 'normal',
  shift: DEFAULT_SHIFT,
  steps: 50,
  cfg: 5,
  skipLayer: { layers: SKIPPED_LAYERS, scale: 2.5, start: 0.01, end: 0.2, rule: 'steps' },
  denoise: 0.8,
  denoiseRule: 'stability',
};

/** huggingface/diffusers, `StableDiffusion3Pipeline` and its img2img variant. */
export const diffusersDefaults: SamplingDefaults = {
  sampler: 'euler',
  schedule: 'normal',
  shift: DEFAULT_SHIFT,
  steps: 28,
  cfg: 7,
  skipLayer: { layers: SKIPPED_LAYERS, scale: 2.8, start: 0.01, end: 0.2, rule: 'steps' },
  denoise: 0.6,
  denoiseRule: 'diffusers',
};

/** The diffusers example in the model card of stabilityai/stable-diffusion-3.5-medium. */
export const modelCardDefaults: SamplingDefaults = { ...diffusersDefaults, steps: 40, cfg: 4.5 };

/** ComfyUI's preset for its node SkipLayerGuidanceSD3. Its samplers and schedules have no preset made for this model. */
export const comfyuiSkipLayer: SkipLayerGuidance = {
  layers: SKIPPED_LAYERS,
  scale: 3,
  start: 0.01,
  end: 0.15,
  rule: 'sigma',
};

/** What this package uses where nothing is said: Stability's own settings. */
export const samplingDefaults: SamplingDefaults = stabilityDefaults;
