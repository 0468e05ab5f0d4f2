/**
 * The step cache on the shipped model: how much it reuses, how much faster sampling gets, and how far pictures move from
 * those of the full run; beside it full runs of fewer steps, which save time as well. `SHEET` names a PNG to look at: a
 * row a run, a column a prompt.
 */

import { writePng } from '../src/image/files.node.ts';
import { imageFromTensor, type RgbImage } from '../src/image/image.ts';
import { encodePng } from '../src/image/png.ts';
import { loadAutoencoder } from '../src/models/autoencoder.ts';
import { vaeDownscale } from '../src/models/config.ts';
import { createStepCache, type StepCache } from '../src/models/step-cache.ts';
import { loadClip, loadT5 } from '../src/models/text-encoders.ts';
import { loadTransformer, type Transformer } from '../src/models/transformer.ts';
import { velocityModel } from '../src/pipeline/pipeline.ts';
import { nodeRuntime } from '../src/runtime/node.node.ts';
import { guidedDenoiser } from '../src/sampling/guidance.ts';
import { torchGenerator } from '../src/sampling/noise.ts';
import { samplers } from '../src/sampling/samplers.ts';
import { scheduleSigmas, timestep } from '../src/sampling/schedules.ts';
import { elementCount, type FloatTensor, floats } from '../src/tensor/data.ts';
import { type Conditioning, encodePrompts } from '../src/text/conditioning.ts';
import { clipTokenizer, t5Tokenizer } from '../src/text/tokenizer.ts';
import { type TextEncoders, tokenizePrompt } from '../src/text/tokens.ts';
import type { Checkpoint } from '../src/weights/checkpoint.ts';
import { SMALL, withModel } from './models.ts';
import { median, publish, QUICK, range, rounded, THREADS } from './support.ts';

/** Picture i has seed i. */
const PROMPTS = [
  '3d fox on a teal background',
  'flat apple on a white background',
  'glossy rocket on a blue background',
  'cartoon cat on a yellow background',
  '3d rose on a pink background',
  'flat house on a green background',
  'cartoon owl on a purple background',
  'glossy pizza on a black background',
  '3d banana on a white background',
  'flat car on a teal background',
  'cartoon tree on a red background',
  'glossy cat on an orange background',
].slice(0, QUICK ? 1 : undefined);
const THRESHOLDS = QUICK ? [0.1] : [0.05, 0.08, 0.1, 0.12, 0.15, 0.2];
const FEWER_STEPS = QUICK ? [] : [20, 18, 16, 14];
const [STEPS, CFG, SIDE] = [QUICK ? 6 : 28, 4, 128];
const SAMPLER = 'dpmpp_2m';

/** One way of drawing the pictures. */
interface Variant {
  readonly name: string;
  readonly steps: number;
  /** Without one, the network runs in one piece. */
  readonly threshold?: number;
}

const variants: readonly Variant[] = [
  { name: 'full', steps: STEPS },
  ...THRESHOLDS.map((threshold) => ({ name: `threshold ${threshold}`, steps: STEPS, threshold })),
  ...FEWER_STEPS.map((steps) => ({ name: `full, ${steps} steps`, steps })),
];

interface Result {
  readonly seconds: number;
  readonly latent: FloatTensor;
  readonly reused: number;
}

if (!SMALL) {
  console.log('Step cache: not measured, the small model is not there; models/small/README.md says how to train it.');
} else {
  await withModel(SMALL, async (checkpoint) => {
    const { parts } = checkpoint;
    const runtime = nodeRuntime({ threads: THREADS });
    const [negative, ...positives] = (await conditionings(checkpoint, ['', ...PROMPTS])) as [Conditioning];
    const latentSide = SIDE / vaeDownscale(parts.vae!.config);
    const shape = [1, parts.transformer!.config.inChannels, latentSide, latentSide];
    const vae = loadAutoencoder(runtime, parts.vae!);
    // A network that was cut for the cache stays cut.
    const [whole, cut] = [0, 1].map(() => loadTransformer(runtime, parts.transformer!)) as [Transformer, Transformer];
    const draw = ({ steps, threshold }: Variant, picture: number): Promise<Result> => {
      const sigmas = scheduleSigmas('normal', steps);
      const cache =
        threshold === undefined ? undefined : createStepCache({ threshold, lastTimestep: timestep(sigmas.at(-2)!) });
      const network = cache ? withCache(cut, cache) : whole;
      return sample(network, positives[picture]!, negative, { seed: picture, shape, sigmas, cache });
    };

    for (const variant of variants) await draw({ ...variant, steps: 2 }, 0);
    const results = variants.map(() => [] as Result[]);
    // In turn, so that what slows the machine down for a while slows all.
    for (const picture of PROMPTS.keys()) {
      for (const [i, variant] of variants.entries()) results[i]!.push(await draw(variant, picture));
    }
    const pictures: RgbImage[][] = [];
    for (const row of results) {
      pictures.push([]);
      for (const { latent } of row) pictures.at(-1)!.push(imageFromTensor(await vae.decode(latent))[0]!);
    }
    if (process.env.SHEET) await writePng(process.env.SHEET, encodePng(sheet(pictures)));

    const rows = variants.map(({ name, steps, threshold }, i) => {
      const speedUps = results[i]!.map(({ seconds }, picture) => results[0]![picture]!.seconds / seconds);
      // Pictures that are the same have no ratio.
      const ratios = pictures[i]!.map((picture, column) => psnr(picture, pictures[0]![column]!)).filter(
        Number.isFinite,
      );
      const share = mean(results[i]!.map(({ reused }) => reused / steps));
      return {
        run: name,
        'evaluations reused, %': threshold === undefined ? '' : Math.round(100 * share),
        'seconds a picture': rounded(median(results[i]!.map(({ seconds }) => seconds))),
        'speed-up': rounded(median(speedUps)),
        'of single pictures': i === 0 ? '' : range(speedUps),
        // Where the first block and the output are next to nothing: what a deep network comes near.
        'speed-up at most': rounded(1 / (1 - share) / (steps / STEPS)),
        'PSNR, dB': ratios.length === 0 ? '' : rounded(mean(ratios)),
        lowest: ratios.length === 0 ? '' : rounded(Math.min(...ratios)),
      };
    });
    await publish({
      title: 'Step cache: speed-up of the sampling loop, and PSNR against the full run',
      rows,
      settings: { pictures: PROMPTS.length, side: SIDE, steps: STEPS, cfg: CFG, sampler: SAMPLER, threads: THREADS },
    });
    await Promise.all([whole.dispose(), cut.dispose(), vae.dispose()]);
  });
}

async function conditionings({ parts, tokenizers }: Checkpoint, prompts: readonly string[]): Promise<Conditioning[]> {
  const runtime = nodeRuntime({ threads: THREADS });
  const [clipL, clipG, t5] = [
    loadClip(runtime, parts.clipL!),
    loadClip(runtime, parts.clipG!),
    loadT5(runtime, parts.t5!),
  ];
  const clip = clipTokenizer(tokenizers.clip!);
  const texts: TextEncoders = {
    clipL: { tokenizer: clip, positions: clipL.config.positions },
    clipG: { tokenizer: clip, positions: clipG.config.positions },
    t5: { tokenizer: t5Tokenizer(tokenizers.t5!) },
  };
  const tokens = prompts.map((prompt) => tokenizePrompt(prompt, texts, { t5Tokens: { minimum: t5.config.tokens } }));
  const { contextWidth, pooledWidth } = parts.transformer!.config;
  const encoded = await encodePrompts(tokens, { clipL, clipG, t5, contextWidth, pooledWidth });
  await Promise.all([clipL.dispose(), clipG.dispose(), t5.dispose()]);
  return encoded;
}

function withCache(transformer: Transformer, cache: StepCache): Transformer {
  const velocities: Transformer['velocities'] = (latent, timesteps, passes, options) =>
    transformer.velocities(latent, timesteps, passes, { ...options, cache });
  return { ...transformer, velocities };
}

/** The sampling loop alone. */
async function sample(
  transformer: Transformer,
  positive: Conditioning,
  negative: Conditioning,
  options: { seed: number; shape: readonly number[]; sigmas: Float32Array; cache: StepCache | undefined },
): Promise<Result> {
  const { seed, shape, sigmas, cache } = options;
  const velocity = velocityModel(transformer, positive, negative);
  const denoise = guidedDenoiser({ velocity, shape, cfg: CFG, steps: sigmas.length - 1 });
  let latent: Float32Array = torchGenerator(seed)
    .normal(elementCount(shape))
    .map((value) => value * sigmas[0]!);
  const start = performance.now();
  for await (const step of samplers[SAMPLER](denoise, latent, sigmas)) latent = step.latent;
  const seconds = (performance.now() - start) / 1000;
  return { seconds, latent: floats(shape, latent), reused: cache?.reused ?? 0 };
}

/** Peak signal-to-noise ratio in decibels. */
function psnr(a: RgbImage, b: RgbImage): number {
  const squares = a.data.reduce((sum, value, i) => sum + (value - b.data[i]!) ** 2, 0);
  return 10 * Math.log10(255 ** 2 / (squares / a.data.length));
}

function mean(values: readonly number[]): number {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

/** All pictures in one. */
function sheet(pictures: readonly (readonly RgbImage[])[]): RgbImage {
  const [width, height] = [SIDE * pictures[0]!.length, SIDE * pictures.length];
  const data = new Uint8Array(3 * width * height);
  for (const [row, line] of pictures.entries()) {
    for (const [column, picture] of line.entries()) {
      for (let y = 0; y < SIDE; y++) {
        const own = picture.data.subarray(3 * SIDE * y, 3 * SIDE * (y + 1));
        data.set(own, 3 * (width * (SIDE * row + y) + SIDE * column));
      }
    }
  }
  return { width, height, data };
}
