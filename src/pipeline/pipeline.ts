/** Text to image, image to image and inpainting: the road from a prompt to pictures. */

import { MmditxError } from '../errors.ts';
import { imageFromTensor, imageHash, latentMask, type RgbImage, tensorFromImage } from '../image/image.ts';
import { encodePng } from '../image/png.ts';
import { fitPreviewFactors, type PreviewFactors, previewImage } from '../image/preview.ts';
import { type GenerationSettings, settingsText } from '../image/settings.ts';
import { type Autoencoder, latentOf, loadAutoencoder } from '../models/autoencoder.ts';
import type { NetworkOptions } from '../models/bind.ts';
import { T5_DEFAULT_TOKENS, vaeDownscale } from '../models/config.ts';
import { createStepCache, type StepCache } from '../models/step-cache.ts';
import { type ClipEncoder, loadClip, loadT5, type T5Encoder } from '../models/text-encoders.ts';
import { loadTransformer, type Transformer } from '../models/transformer.ts';
import type { Runtime } from '../runtime/runtime.ts';
import { guidedDenoiser, type Pass, type VelocityModel } from '../sampling/guidance.ts';
import { samplerNoise, torchGenerator } from '../sampling/noise.ts';
import { samplers } from '../sampling/samplers.ts';
import { partialSigmas, scheduleSigmas, timestep } from '../sampling/schedules.ts';
import type { Denoiser } from '../sampling/steps.ts';
import { elementCount, type FloatTensor, floats } from '../tensor/data.ts';
import { type Conditioning, type Encoders, encodePrompts } from '../text/conditioning.ts';
import { extractLoras } from '../text/lora-prompt.ts';
import { clipTokenizer, t5Tokenizer } from '../text/tokenizer.ts';
import { type TextEncoders, tokenizePrompt } from '../text/tokens.ts';
import { VERSION } from '../version.ts';
import { type Checkpoint, partTitles } from '../weights/checkpoint.ts';
import type { Precision } from '../weights/convert.ts';
import { findNonFinite } from '../weights/inspect.ts';
import { combineLoras, type Lora, type LoraUse } from '../weights/lora.ts';
import type { LoraPart } from '../weights/lora-names.ts';
import { quote } from '../weights/quote.ts';
import { type ModelDefaults, modelDefaults, storedPreviewFactors } from './defaults.ts';
import { type CompleteOptions, completeOptions, type GenerateOptions } from './options.ts';

/** A finished picture and what it was made with. */
export interface GeneratedImage extends RgbImage {
  readonly settings: GenerationSettings;
  /** The picture as a PNG file that carries its settings: A1111's `parameters` text and this package's JSON. */
  png(): Uint8Array;
}

export type GenerationEvent =
  /** Something the user should know: words that were cut, an encoder that is missing. */
  | { readonly type: 'warning'; readonly message: string }
  | {
      readonly type: 'step';
      /** Steps done, 1 to `steps`. */
      readonly step: number;
      readonly steps: number;
      /** Noise level that is left. */
      readonly sigma: number;
      /** The pictures so far, an eighth of the size: a linear map of the latent, cheap enough for every step. */
      preview(): Promise<RgbImage[]>;
    }
  | { readonly type: 'images'; readonly images: readonly GeneratedImage[] };

export interface StableDiffusion {
  /** Name and hash of the model, as settings in pictures have them. */
  readonly model: ModelIdentity;
  /** What this model uses where an option is left out. */
  readonly defaults: ModelDefaults;
  /** Widths and heights are multiples of this. */
  readonly sizeUnit: number;
  readonly precision: Precision;
  /**
   * Draws pictures.
   * @param onEvent called with warnings and after every step
   * @throws MmditxError `bad-option` before the work starts, `not-finite` when the model fails; the signal's reason
   */
  generate(options: GenerateOptions, onEvent?: (event: GenerationEvent) => void): Promise<readonly GeneratedImage[]>;
  /** The same as a stream that ends with the pictures. Leaving the loop stops the work. */
  stream(options: GenerateOptions): AsyncGenerator<GenerationEvent, void>;
  /** Gives the memory of all networks back. */
  dispose(): Promise<void>;
}

export interface PipelineSource {
  readonly checkpoint: Checkpoint;
  readonly runtime: Runtime;
  /** Texts of tokenizer.json files, where the checkpoint does not bring its own. */
  readonly tokenizers?: { readonly clip?: string; readonly t5?: string };
  /** Whole files by name, where the checkpoint's sources have no path (in a browser). */
  readonly bytes?: ReadonlyMap<string, Uint8Array>;
  readonly model: ModelIdentity;
  /** What the weights are kept as (default `fp32`). */
  readonly precision?: Precision;
  /**
   * Give each network's memory back once it has done its work for a picture (default false): text encoders before the
   * transformer loads, the transformer before the picture is decoded.
   */
  readonly release?: boolean;
  /** The LoRA that a tag in a prompt names; without it, prompts cannot name any. */
  readonly findLora?: (name: string) => Promise<Lora>;
}

export interface ModelIdentity {
  readonly name: string;
  /** Null where it is unknown. */
  readonly hash: string | null;
}

/** The networks of a checkpoint, ready to load when first used. */
interface Networks {
  readonly transformer: Transformer;
  readonly vae: Autoencoder;
  readonly clipL: ClipEncoder | undefined;
  readonly clipG: ClipEncoder | undefined;
  readonly t5: T5Encoder | undefined;
}

/**
 * A pipeline over a checkpoint's parts. It needs a transformer, a VAE and at least one text encoder.
 * @throws MmditxError `missing-part`
 */
export function createPipeline(source: PipelineSource): StableDiffusion {
  const { checkpoint, release = false, precision = 'fp32' } = source;
  const { parts } = checkpoint;
  for (const part of ['transformer', 'vae'] as const) {
    if (!parts[part]) {
      const files = checkpoint.files.map(({ source: file }) => file.name).join(', ');
      throw new MmditxError('missing-part', `There is no ${partTitles[part]} in ${files}; add the file that holds it.`);
    }
  }
  let current: LoadedNetworks = { networks: loadNetworks(source, []), loras: '', users: 0 };
  const loaded = new Set([current]);
  /** Networks give their memory back when others have taken their place and the last picture with them is done. */
  const retire = async (old: LoadedNetworks) => {
    if (old === current || old.users > 0) return;
    loaded.delete(old);
    await disposeNetworks(old.networks);
  };
  /** The networks with LoRAs, for one picture that counts as their user until it is done. */
  const networksWith = async (used: readonly LoraUse[]): Promise<LoadedNetworks> => {
    const loras = JSON.stringify(used.map(({ lora, ...strengths }) => [loraNumber(lora), strengths]));
    if (loras !== current.loras) {
      const old = current;
      current = { networks: loadNetworks(source, used), loras, users: 0 };
      loaded.add(current);
      await retire(old);
    }
    current.users++;
    return current;
  };
  const encoders = textEncoders(source);
  if (!encoders.clipL && !encoders.clipG && !encoders.t5) {
    throw new MmditxError('missing-part', 'There is no text encoder; add files with CLIP-L, CLIP-G or T5.');
  }
  const defaults = modelDefaults(parts.transformer!.metadata, parts.transformer!.file);
  const facts = {
    transformer: parts.transformer!.config,
    vae: parts.vae!.config,
    defaults,
    t5Tokens: parts.t5?.config.tokens ?? 0,
  };
  const sizeUnit = vaeDownscale(facts.vae) * facts.transformer.patchSize;
  let previewFactors: PreviewFactors | undefined = storedPreviewFactors(parts.vae!.metadata, parts.vae!.file);

  let disposed = false;
  const requireModel = () => {
    if (disposed) throw new MmditxError('bad-option', 'This model has been disposed of; load it again.');
  };

  async function* draw(options: GenerateOptions): AsyncGenerator<GenerationEvent, void> {
    requireModel();
    const complete = completeOptions(options, { ...facts, t5Tokens: facts.t5Tokens || 1 });
    const { prompts, used, warnings: ignored } = await promptLoras(complete, source.findLora);
    for (const message of ignored) yield { type: 'warning', message };
    await Promise.all(checkpoint.files.map(({ source: file }) => file.requireUnchanged?.()));
    const own = await networksWith(used);
    try {
      yield* drawWith(own.networks, complete, prompts);
    } finally {
      own.users--;
      await retire(own);
    }
  }

  async function* drawWith(
    networks: Networks,
    complete: CompleteOptions,
    prompts: Pick<CompleteOptions, 'prompt' | 'negativePrompt'>,
  ): AsyncGenerator<GenerationEvent, void> {
    for (const message of missingEncoders(networks)) yield { type: 'warning', message };
    const { warnings, positive, negative } = await conditioningOf(networks, encoders, { ...complete, ...prompts });
    for (const message of warnings) yield { type: 'warning', message };

    const latentShape = [
      complete.batchSize,
      facts.vae.latentChannels,
      complete.height / vaeDownscale(facts.vae),
      complete.width / vaeDownscale(facts.vae),
    ];
    const preview = (latent: Float32Array) => async () => {
      previewFactors ??= await fitPreviewFactors((z) => networks.vae.decode(z), facts.vae.latentChannels);
      return previewImage(floats(latentShape, latent), previewFactors);
    };
    let latent: Float32Array | undefined;
    for await (const step of sample(networks, complete, latentShape, positive, negative)) {
      requireModel();
      latent = step.latent;
      const { step: done, steps, sigmaNext: sigma, denoised } = step;
      yield { type: 'step', step: done, steps, sigma, preview: preview(denoised) };
    }
    complete.signal?.throwIfAborted();
    if (release) await networks.transformer.dispose();
    const images = await pictures({ ...source, precision }, networks, complete, floats(latentShape, latent!));
    if (release) await networks.vae.dispose();
    yield { type: 'images', images };
  }

  async function* stream(options: GenerateOptions): AsyncGenerator<GenerationEvent, void> {
    try {
      yield* draw(options);
    } catch (error) {
      throw await explained(error, checkpoint);
    }
  }

  return {
    model: source.model,
    defaults,
    sizeUnit,
    precision,
    stream,
    async generate(options, onEvent) {
      let images: readonly GeneratedImage[] = [];
      for await (const event of stream(options)) {
        onEvent?.(event);
        if (event.type === 'images') images = event.images;
      }
      return images;
    },
    async dispose() {
      disposed = true;
      await Promise.all([...loaded].map(({ networks }) => disposeNetworks(networks)));
    },
  };
}

/** Networks with the LoRAs they were loaded with. */
interface LoadedNetworks {
  readonly networks: Networks;
  readonly loras: string;
  /** Pictures that are being drawn with them. */
  users: number;
}

/** Tells LoRAs apart, those of one name too. */
const loraNumbers = new WeakMap<Lora, number>();
let lastLora = 0;

function loraNumber(lora: Lora): number {
  const known = loraNumbers.get(lora);
  if (known !== undefined) return known;
  loraNumbers.set(lora, ++lastLora);
  return lastLora;
}

/** Prepares the networks of a checkpoint with LoRAs; weights load at the first use. */
function loadNetworks(source: PipelineSource, loras: readonly LoraUse[]): Networks {
  const { checkpoint, runtime, bytes, release = false, precision = 'fp32' } = source;
  const { transformer, vae, clipL, clipG, t5 } = checkpoint.parts;
  const options = (part: LoraPart): NetworkOptions => {
    const shapes = new Map([...(checkpoint.parts[part]?.tensors ?? [])].map(([name, { shape }]) => [name, shape]));
    return { bytes, changes: combineLoras(loras, part, shapes), expandWeights: precision === 'fp32' };
  };
  const encoderOptions = (part: LoraPart) => ({ ...options(part), release });
  return {
    transformer: loadTransformer(runtime, transformer!, options('transformer')),
    vae: loadAutoencoder(runtime, vae!, bytes),
    clipL: clipL && loadClip(runtime, clipL, encoderOptions('clipL')),
    clipG: clipG && loadClip(runtime, clipG, encoderOptions('clipG')),
    t5: t5 && loadT5(runtime, t5, encoderOptions('t5')),
  };
}

async function disposeNetworks(networks: Networks): Promise<void> {
  await Promise.all(Object.values(networks).map((network) => network?.dispose()));
}

/** The LoRAs of options and prompt, and the prompts without their tags. */
async function promptLoras(
  { prompt, negativePrompt, promptSyntax, loras }: CompleteOptions,
  findLora: PipelineSource['findLora'],
): Promise<{
  prompts: Pick<CompleteOptions, 'prompt' | 'negativePrompt'>;
  used: readonly LoraUse[];
  warnings: readonly string[];
}> {
  if (promptSyntax !== 'a1111') return { prompts: { prompt, negativePrompt }, used: loras, warnings: [] };
  const positive = extractLoras(prompt);
  const negative = extractLoras(negativePrompt);
  const used = [...loras];
  for (const { name, strength, clipStrength } of positive.loras) {
    if (!findLora) {
      throw new MmditxError(
        'bad-option',
        `The prompt asks for the LoRA ${quote(name)}, but none can be found by name here; give it as an option.`,
      );
    }
    used.push({ lora: await findLora(name), strength, clipStrength });
  }
  const warnings = negative.loras.length > 0 ? ['LoRAs in the negative prompt have no effect.'] : [];
  return { prompts: { prompt: positive.prompt, negativePrompt: negative.prompt }, used, warnings };
}

/** Tokenizers of the encoders at hand; those that the checkpoint brings come first. */
function textEncoders({ checkpoint: { parts, tokenizers }, tokenizers: given }: PipelineSource): TextEncoders {
  const clipJson = tokenizers.clip ?? given?.clip;
  const t5Json = tokenizers.t5 ?? given?.t5;
  if ((parts.clipL || parts.clipG) && clipJson === undefined) throw missingTokenizer('CLIP');
  if (parts.t5 && t5Json === undefined) throw missingTokenizer('T5');
  const clip = clipJson === undefined ? undefined : clipTokenizer(clipJson);
  return {
    ...(parts.clipL && { clipL: { tokenizer: clip!, positions: parts.clipL.config.positions } }),
    ...(parts.clipG && { clipG: { tokenizer: clip!, positions: parts.clipG.config.positions } }),
    ...(parts.t5 && { t5: { tokenizer: t5Tokenizer(t5Json!) } }),
  };
}

function missingTokenizer(encoder: string): MmditxError {
  return new MmditxError(
    'missing-part',
    `The checkpoint brings no ${encoder} tokenizer; give the encoder's tokenizer.json (from the model's page on Hugging Face).`,
  );
}

function missingEncoders({ clipL, clipG, t5 }: Networks): string[] {
  const missing = [...(clipL ? [] : ['CLIP-L']), ...(clipG ? [] : ['CLIP-G']), ...(t5 ? [] : ['T5'])];
  return missing.map((name) => `The model has no ${name} text encoder; pictures follow the prompt less closely.`);
}

async function conditioningOf(
  { transformer, clipL, clipG, t5 }: Networks,
  textEncoders: TextEncoders,
  options: CompleteOptions,
): Promise<{ warnings: string[]; positive: Conditioning; negative: Conditioning }> {
  const { contextWidth, pooledWidth } = transformer.config;
  const encoders: Encoders = { clipL, clipG, t5, contextWidth, pooledWidth };
  // A model that states a length of its own was trained with that; the released ones with 77 and 256 tokens.
  const own = t5 && t5.config.tokens !== T5_DEFAULT_TOKENS ? { trainedT5Tokens: t5.config.tokens } : {};
  const { promptSyntax: syntax, longPrompt, t5Tokens } = options;
  const tokenOptions = { syntax, longPrompt, t5Tokens, ...own };
  const texts = options.cfg === 1 ? [options.prompt] : [options.prompt, options.negativePrompt];
  const tokens = texts.map((text) => tokenizePrompt(text, textEncoders, tokenOptions));
  const [positive, negative = positive] = (await encodePrompts(tokens, encoders, {
    signal: options.signal,
    missingT5: options.missingT5,
  })) as [Conditioning, Conditioning?];
  return { warnings: [...new Set(tokens.flatMap(({ warnings }) => warnings))], positive, negative };
}

/** Noise, or a noised picture, down the schedule to a latent. */
async function* sample(
  networks: Networks,
  options: CompleteOptions,
  shape: readonly number[],
  positive: Conditioning,
  negative: Conditioning,
) {
  const { steps, shift, scheduler, seed, strength, denoiseRule, signal } = options;
  const noise = torchGenerator(seed).normal(elementCount(shape));
  const schedule = (count: number) => scheduleSigmas(scheduler, count, { shift });
  const sigmas = options.initImage ? partialSigmas(schedule, steps, strength, denoiseRule) : schedule(steps);
  if (sigmas.length < 2) {
    throw new MmditxError(
      'bad-option',
      `A strength of ${strength} leaves none of ${steps} steps to run; raise either.`,
    );
  }
  const cache = options.stepCache
    ? createStepCache({ threshold: options.stepCache, lastTimestep: timestep(sigmas.at(-2)!) })
    : undefined;
  const guided = guidedDenoiser({
    velocity: velocityModel(networks.transformer, positive, negative, cache),
    shape,
    cfg: options.cfg,
    steps,
    shift,
    ...(options.skipLayerGuidance && { skipLayer: options.skipLayerGuidance }),
    ...(signal && { signal }),
  });
  const clean = options.initImage && (await encodedImage(networks.vae, options.initImage, options, shape));
  const start = clean ? noised(clean, noise, sigmas[0]!) : noise.map((value) => value * sigmas[0]!);
  const denoise = clean && options.mask ? maskedDenoiser(guided, options.mask, clean, noise, shape) : guided;
  const drawn = samplerNoise(seed, elementCount(shape));
  yield* samplers[options.sampler](denoise, start, sigmas, { noise: drawn, shift, ...(signal && { signal }) });
}

/**
 * The transformer as guidance asks for it.
 * @param cache of this sampling run alone
 */
export function velocityModel(
  transformer: Transformer,
  positive: Conditioning,
  negative: Conditioning,
  cache?: StepCache,
): VelocityModel {
  return ({ latent, sigma, passes, skipLayers, signal }) => {
    const of: Record<Pass, Conditioning & { skipLayers?: readonly number[] }> = {
      positive,
      negative,
      'positive-skipping-layers': { ...positive, skipLayers },
    };
    const timesteps = new Float32Array(latent.shape[0]!).fill(timestep(sigma));
    return transformer.velocities(
      latent,
      timesteps,
      passes.map((pass) => of[pass]),
      { signal, cache },
    );
  };
}

/** The picture's latent, once for each item of the batch. */
async function encodedImage(vae: Autoencoder, image: RgbImage, { signal }: CompleteOptions, shape: readonly number[]) {
  // The posterior's mean, as ComfyUI takes it: a sample would make the picture depend on a second seed.
  const latent = latentOf(await vae.encode(tensorFromImage(image), { signal }), vae.config).data;
  const batch = new Float32Array(elementCount(shape));
  for (let start = 0; start < batch.length; start += latent.length) batch.set(latent, start);
  return batch;
}

/** (1 - sigma) latent + sigma noise. */
function noised(latent: Float32Array, noise: Float32Array, sigma: number): Float32Array {
  return latent.map((value, i) => (1 - sigma) * value + sigma * noise[i]!);
}

/**
 * Holds what the mask keeps at the original picture in every step (ComfyUI, `KSamplerX0Inpaint`): the model sees the
 * original at the same noise level there, and its prediction is replaced by the original.
 */
function maskedDenoiser(
  denoise: Denoiser,
  mask: FloatTensor,
  clean: Float32Array,
  noise: Float32Array,
  shape: readonly number[],
): Denoiser {
  const [, , height, width] = shape as [number, number, number, number];
  const repaint = latentMask(mask, height, width).data;
  const pixels = height * width;
  const blended = (painted: Float32Array, kept: (i: number) => number) =>
    painted.map((value, i) => {
      const share = repaint[i % pixels]!;
      return value * share + kept(i) * (1 - share);
    });
  return async (latent, sigma) => {
    const seen = blended(latent, (i) => (1 - sigma) * clean[i]! + sigma * noise[i]!);
    return blended(await denoise(seen, sigma), (i) => clean[i]!);
  };
}

async function pictures(
  { model, runtime, precision = 'fp32' }: PipelineSource,
  { vae }: Networks,
  options: CompleteOptions,
  latent: FloatTensor,
): Promise<GeneratedImage[]> {
  const { initImage, mask } = options;
  const decoded = imageFromTensor(await vae.decode(latent, { signal: options.signal }));
  const kept = initImage && mask ? decoded.map((image) => keepUnmasked(image, initImage, mask)) : decoded;
  const settings: Omit<GenerationSettings, 'batch'> = {
    version: 1,
    software: `mmditx ${VERSION}`,
    model: { ...model },
    device: runtime.device,
    precision,
    prompt: options.prompt,
    negativePrompt: options.negativePrompt,
    promptSyntax: options.promptSyntax,
    longPrompt: options.longPrompt,
    t5Tokens: { ...options.t5Tokens },
    width: options.width,
    height: options.height,
    steps: options.steps,
    cfg: options.cfg,
    sampler: options.sampler,
    scheduler: options.scheduler,
    shift: options.shift,
    seed: options.seed,
    loras: options.loras.map(({ lora, strength, clipStrength = strength }) => ({
      name: lora.name.slice(lora.name.search(/[^/\\]*$/)),
      strength,
      clipStrength,
    })),
    skipLayerGuidance: options.skipLayerGuidance
      ? { ...options.skipLayerGuidance, layers: [...options.skipLayerGuidance.layers] }
      : null,
    stepCache: options.stepCache || null,
    initImage: initImage
      ? { sha256: await imageHash(initImage), strength: options.strength, denoiseRule: options.denoiseRule }
      : null,
    mask: mask ? { sha256: await imageHash(maskImage(mask)), channel: 'luminance' } : null,
  };
  return kept.map((image, index) => {
    const own = { ...settings, batch: { index, size: kept.length } };
    return { ...image, settings: own, png: () => encodePng(image, { text: settingsText(own) }) };
  });
}

/** The original's pixels where the mask keeps them: the VAE alone would change them slightly. */
function keepUnmasked(image: RgbImage, original: RgbImage, mask: FloatTensor): RgbImage {
  const data = image.data.map((value, i) => {
    const share = mask.data[Math.floor(i / 3)]!;
    return Math.round(value * share + original.data[i]! * (1 - share));
  });
  return { ...image, data };
}

/** A mask as the picture whose hash the settings carry. */
export function maskImage(mask: FloatTensor): RgbImage {
  const [, , height, width] = mask.shape as [number, number, number, number];
  return {
    width,
    height,
    data: Uint8Array.from({ length: 3 * width * height }, (_, i) => 255 * mask.data[Math.floor(i / 3)]!),
  };
}

/** A failure of the numbers, with the weight that causes it if the file has one that is not finite. */
async function explained(error: unknown, { parts }: Checkpoint): Promise<unknown> {
  if (!(error instanceof MmditxError) || error.code !== 'not-finite') return error;
  for (const part of Object.values(parts)) {
    const [broken] = await findNonFinite(part);
    if (broken) {
      return new MmditxError(
        'bad-file',
        `The weight ${broken.name} in ${part.file} has ${broken.count} values that are not finite; download the file again.`,
        { cause: error },
      );
    }
  }
  return error;
}
