/** What a picture is asked for with: the options of `generate`, checked and completed. */

import { MmditxError } from '../errors.ts';
import type { RgbImage } from '../image/image.ts';
import { type TransformerConfig, type VaeConfig, vaeDownscale } from '../models/config.ts';
import { DEFAULT_CACHE_THRESHOLD, requireCacheThreshold } from '../models/step-cache.ts';
import type { SkipLayerGuidance } from '../sampling/guidance.ts';
import { type SamplerName, samplerNames } from '../sampling/samplers.ts';
import { type DenoiseRule, MAX_STEPS, type ScheduleName, scheduleNames } from '../sampling/schedules.ts';
import type { FloatTensor } from '../tensor/data.ts';
import type { PromptSyntax } from '../text/prompt-weights.ts';
import type { TokenOptions } from '../text/tokens.ts';
import type { LoraUse } from '../weights/lora.ts';
import type { ModelDefaults } from './defaults.ts';

export interface GenerateOptions {
  /** What to draw. Brackets weigh words: `(word:1.2)`, `((word))`, `[word]`; see {@link promptSyntax}. */
  prompt: string;
  /** What to keep away from (default empty). Not computed at a `cfg` of 1. */
  negativePrompt?: string;
  /** Size in pixels, multiples of 16 within the model's position table (default the model's; 1024 for SD3.5 Medium). */
  width?: number;
  height?: number;
  /** Steps of the sampler, 1 to 10000 (default 50, Stability's). */
  steps?: number;
  /** Classifier-free guidance scale (default 5, Stability's). */
  cfg?: number;
  /** Default `dpmpp_2m`, Stability's. */
  sampler?: SamplerName;
  /** Default `normal`, Stability's and diffusers'. */
  scheduler?: ScheduleName;
  /** Timestep shift (default 3, that of every SD3.5 model). */
  shift?: number;
  /** 0 to 2^64 - 1; the same seed gives the same noise as in ComfyUI and Stability's code (default random). */
  seed?: number | bigint;
  /** Pictures made at once (default 1). Their noise is one stream, as in ComfyUI. */
  batchSize?: number;
  /** Skip-layer guidance: `true` for the official settings, or those to change (default off, as in the references). */
  skipLayerGuidance?: boolean | Partial<SkipLayerGuidance>;
  /**
   * Reuses the work of earlier steps where the first block tells that little has changed: faster, and not quite the
   * same picture. `true` for a threshold of 0.1, or one from 0 (off) to 1 (default off).
   */
  stepCache?: boolean | number;
  /** LoRAs with their strengths (default none), besides those that the prompt names as in `<lora:name:0.8>`. */
  loras?: readonly LoraUse[];
  /** Picture to start from, of the size asked for. */
  initImage?: RgbImage;
  /** Share of `initImage` that is redrawn, above 0 to 1 (default 0.8, Stability's). */
  strength?: number;
  /** How `strength` shortens the schedule (default `stability`). */
  denoiseRule?: DenoiseRule;
  /** What of `initImage` is repainted, [1, 1, height, width] in 0..1, 1 repaints; the rest keeps its pixels. */
  mask?: FloatTensor;
  /** How brackets are read (default `a1111`: `( )` as in ComfyUI, and `[ ]`). */
  promptSyntax?: PromptSyntax;
  /** Prompts over 77 CLIP tokens: several chunks (ComfyUI, default) or cut with a warning (diffusers). */
  longPrompt?: 'chunk' | 'truncate';
  /** Number of T5 tokens (default at least 77, as ComfyUI; diffusers uses `{ length: 256 }`). */
  t5Tokens?: NonNullable<TokenOptions['t5Tokens']>;
  /**
   * What stands for T5's tokens when the model has no T5: nothing (`omit`, ComfyUI, default) or this many zeros
   * (Stability's code: 77, diffusers: 256).
   */
  missingT5?: 'omit' | number;
  /** Stops between two steps; the call rejects with the signal's reason. */
  signal?: AbortSignal;
}

/** Options with everything decided. */
export interface CompleteOptions
  extends Required<Omit<GenerateOptions, 'skipLayerGuidance' | 'stepCache' | 'initImage' | 'mask' | 'signal'>> {
  skipLayerGuidance: SkipLayerGuidance | undefined;
  /** Threshold; 0 for none. */
  stepCache: number;
  initImage: RgbImage | undefined;
  mask: FloatTensor | undefined;
  signal: AbortSignal | undefined;
}

/** Pictures made at once at most: memory grows with them. */
const MAX_BATCH = 64;
const MAX_SEED = 2n ** 64n - 1n;

export interface ModelFacts {
  readonly transformer: TransformerConfig;
  readonly vae: VaeConfig;
  readonly defaults: ModelDefaults;
  /** T5 tokens a prompt is padded to. */
  readonly t5Tokens: number;
}

/**
 * Fills in defaults and checks everything that can be known before the work starts.
 * @throws MmditxError `bad-option`
 */
export function completeOptions(options: GenerateOptions, model: ModelFacts): CompleteOptions {
  const { defaults } = model;
  const { initImage } = options;
  const guidance = options.skipLayerGuidance;
  const complete: CompleteOptions = {
    prompt: options.prompt,
    negativePrompt: options.negativePrompt ?? '',
    width: options.width ?? initImage?.width ?? defaults.width,
    height: options.height ?? initImage?.height ?? defaults.height,
    steps: options.steps ?? defaults.steps,
    cfg: options.cfg ?? defaults.cfg,
    sampler: options.sampler ?? defaults.sampler,
    scheduler: options.scheduler ?? defaults.schedule,
    shift: options.shift ?? defaults.shift,
    seed: options.seed ?? crypto.getRandomValues(new Uint32Array(1))[0]!,
    batchSize: options.batchSize ?? 1,
    skipLayerGuidance: guidance ? { ...defaults.skipLayer, ...definedMembers(guidance) } : undefined,
    stepCache: options.stepCache === true ? DEFAULT_CACHE_THRESHOLD : Number(options.stepCache ?? 0),
    loras: options.loras ?? [],
    initImage,
    strength: options.strength ?? (initImage ? defaults.denoise : 1),
    denoiseRule: options.denoiseRule ?? defaults.denoiseRule,
    mask: options.mask,
    promptSyntax: options.promptSyntax ?? 'a1111',
    longPrompt: options.longPrompt ?? 'chunk',
    t5Tokens: options.t5Tokens ?? { minimum: model.t5Tokens },
    missingT5: options.missingT5 ?? 'omit',
    signal: options.signal,
  };
  checkSize(complete, model);
  const { steps, batchSize, seed, cfg, sampler, scheduler, strength, mask } = complete;
  require(typeof complete.prompt === 'string', 'The prompt must be a text.');
  require(typeof complete.negativePrompt === 'string', 'The negative prompt must be a text.');
  require(Number.isInteger(steps) &&
    steps >= 1 &&
    steps <= MAX_STEPS, `The number of steps is ${steps}; give 1 to ${MAX_STEPS}.`);
  require(Number.isFinite(cfg), `The guidance scale is ${cfg}; it must be a number.`);
  require(samplerNames.includes(
    sampler,
  ), `There is no sampler "${sampler}"; choose one of ${samplerNames.join(', ')}.`);
  require(scheduleNames.includes(
    scheduler,
  ), `There is no scheduler "${scheduler}"; choose one of ${scheduleNames.join(', ')}.`);
  require(complete.shift > 0 && Number.isFinite(complete.shift), `The shift is ${complete.shift}; it must be above 0.`);
  require(Number.isInteger(batchSize) &&
    batchSize >= 1 &&
    batchSize <= MAX_BATCH, `The batch size is ${batchSize}; give 1 to ${MAX_BATCH}.`);
  const wholeSeed = typeof seed === 'bigint' || Number.isSafeInteger(seed);
  require(wholeSeed && seed >= 0 && seed <= MAX_SEED, `The seed is ${seed}; give a whole number from 0 to 2^64 - 1.`);
  require(strength > 0 && strength <= 1, `The strength is ${strength}; it must be above 0 and at most 1.`);
  checkGuidance(complete.skipLayerGuidance, model.transformer);
  requireCacheThreshold(complete.stepCache);
  const { denoiseRule, longPrompt, promptSyntax, missingT5 } = complete;
  requireOneOf('denoise rule', denoiseRule, ['stability', 'comfyui', 'diffusers']);
  requireOneOf('way with long prompts', longPrompt, ['chunk', 'truncate']);
  requireOneOf('prompt syntax', promptSyntax, ['comfy', 'a1111', 'none']);
  const zeros = missingT5 === 'omit' || (Number.isInteger(missingT5) && missingT5 >= 1 && missingT5 <= MAX_T5_ZEROS);
  require(zeros, `Zeros for a missing T5 are ${missingT5}; give "omit" or a number from 1 to ${MAX_T5_ZEROS}.`);
  require(!mask || initImage, 'A mask needs an initial picture to repaint.');
  const pixels = complete.width * complete.height;
  require(!initImage || initImage.data.length === 3 * pixels, 'The initial picture must have three bytes a pixel.');
  const maskFits =
    !mask || (mask.data.length === pixels && mask.shape[2] === complete.height && mask.shape[3] === complete.width);
  require(maskFits, `The mask must be ${complete.width}x${complete.height} pixels, the size of the picture.`);
  return complete;
}

/** Most zeros for a missing T5: its longest published length is 512. */
const MAX_T5_ZEROS = 512;

function checkGuidance(guidance: SkipLayerGuidance | undefined, { depth }: TransformerConfig): void {
  if (!guidance) return;
  const { layers, scale, start, end, rule } = guidance;
  const wrong = layers.find((layer) => !Number.isInteger(layer) || layer < 0 || layer >= depth);
  require(wrong === undefined, `There is no layer ${wrong} to skip: this model has layers 0 to ${depth - 1}.`);
  require(Number.isFinite(scale) && scale >= 0, `The skip-layer scale is ${scale}; it must be 0 or more.`);
  require(start >= 0 &&
    start <= end &&
    end <= 1, `The skip-layer window is ${start} to ${end}; it must lie within 0 to 1, the start first.`);
  requireOneOf('rule of the skip-layer window', rule, ['steps', 'sigma']);
}

/** The members that have a value, to lay over defaults. */
function definedMembers(guidance: true | Partial<SkipLayerGuidance>): Partial<SkipLayerGuidance> {
  if (guidance === true) return {};
  return Object.fromEntries(Object.entries(guidance).filter(([, value]) => value !== undefined));
}

function requireOneOf(what: string, value: string, choices: readonly string[]): void {
  require(choices.includes(value), `There is no ${what} "${value}"; choose one of ${choices.join(', ')}.`);
}

function checkSize({ width, height, initImage }: CompleteOptions, { transformer, vae }: ModelFacts): void {
  const unit = vaeDownscale(vae) * transformer.patchSize;
  const largest = unit * transformer.tableSize;
  for (const [name, value] of [
    ['width', width],
    ['height', height],
  ] as const) {
    const below = Math.max(unit, Math.min(Math.floor(value / unit) * unit, largest));
    const fits = Number.isInteger(value) && value >= unit && value % unit === 0 && value <= largest;
    require(fits, `The ${name} is ${value}; this model draws multiples of ${unit} from ${unit} to ${largest} pixels, such as ${below || unit}.`);
  }
  require(!initImage ||
    (initImage.width === width &&
      initImage.height ===
        height), `The initial picture is ${initImage?.width}x${initImage?.height} and ${width}x${height} was asked for; resize it first.`);
}

function require(condition: unknown, message: string): asserts condition {
  if (!condition) throw new MmditxError('bad-option', message);
}
