/**
 * `npm run ablations`: what the parts of the recipe do, each against the same run without it, with equal compute and
 * three seeds. Transformers smaller than the shipped one are trained from nothing on its latents and text; results go to
 * `ablations/`. A run that is finished is not repeated.
 */

import { existsSync } from 'node:fs';
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import sharp, { type OverlayOptions } from 'sharp';
import { tensorFromImage } from '../../src/image/image.ts';
import { load } from '../../src/index.node.ts';
import type { GeneratedImage, StableDiffusion } from '../../src/pipeline/pipeline.ts';
import { readTrainLog } from '../../src/training/log.node.ts';
import type { StepEvent } from '../../src/training/log.ts';
import { ATTENTION_LOGIT } from '../../src/training/objective.ts';
import { main } from './command.ts';
import { BACKGROUNDS, backgroundWords, canonicalPrompt } from './data/captions.ts';
import { SHEET } from './data/held-out.ts';
import { buildLibrary, type Library, rankObjects, rankOf } from './data/nearest.ts';
import { loadPictures } from './data/pictures.ts';
import { CACHE, FOLDER, MODEL_FILE } from './paths.ts';
import { PICTURES, preparePictures } from './prepare.ts';

const SEEDS = [1, 2, 3];
const STEPS = Number(process.env.ABLATION_STEPS ?? 1000);
const OUTPUT = join(FOLDER, 'ablations');
const WORK = join(CACHE, 'ablations');

/** Sizes that training sees, and some that it never does: smaller, larger, wider, taller. */
const TRAINED_SIZES: readonly Size[] = [
  [64, 64],
  [96, 96],
];
const OTHER_SIZES: readonly Size[] = [
  [80, 80],
  [128, 128],
  [160, 96],
  [96, 160],
];
type Size = readonly [width: number, height: number];

/** Prompts that are drawn at each size: every fourth of the sheet. */
const PROMPTS = SHEET.filter((_, i) => i % 4 === 0);
/** Shown in the pictures of the table. */
const SHOWN = [0, 5, 10, 15];

interface Variant {
  readonly name: string;
  /** What it is told as. */
  readonly title: string;
  readonly crops: boolean;
  readonly dual: boolean;
  readonly qkNorm: boolean;
  readonly learningRate: number;
}

const RATE = 1.5e-3;
/** Far beyond what training stands without a check on its attention. */
const HIGH_RATE = 1e-2;
const BASE: Variant = {
  name: 'base',
  title: 'as published',
  crops: true,
  dual: true,
  qkNorm: true,
  learningRate: RATE,
};
const VARIANTS: readonly Variant[] = [
  BASE,
  { ...BASE, name: 'centre', title: 'without random position crops', crops: false },
  { ...BASE, name: 'single', title: 'without dual attention', dual: false },
  { ...BASE, name: 'high-rate', title: `learning rate ${HIGH_RATE}, with QK norm`, learningRate: HIGH_RATE },
  {
    ...BASE,
    name: 'high-rate-no-norm',
    title: `learning rate ${HIGH_RATE}, without QK norm`,
    learningRate: HIGH_RATE,
    qkNorm: false,
  },
];

const WIDTH = 192;
const DEPTH = 4;
const DUAL = [0, 1];

/** Dual attention makes a step dearer by its share of the products: 4 of 16 widths squared of an image token in its blocks. */
function stepsOf({ dual }: Variant): number {
  const imageTokens = (16 + 36) / 2;
  const textTokens = 32;
  const cost = (dualBlocks: number) => imageTokens * (12 * DEPTH + 4 * dualBlocks) + textTokens * 12 * DEPTH;
  return dual ? STEPS : Math.round((STEPS * cost(DUAL.length)) / cost(0));
}

function configOf(variant: Variant, seed: number): object {
  const name = runName(variant, seed);
  return {
    name,
    output: join(WORK, name),
    model: MODEL_FILE,
    seed,
    networks: {
      transformer: {
        hiddenSize: WIDTH,
        depth: DEPTH,
        heads: 3,
        tableSize: 24,
        dualAttentionLayers: variant.dual ? DUAL : [],
        qkNorm: variant.qkNorm,
        positions: { grid: 8, span: 8 },
      },
    },
    cache: join(WORK, 'cache'),
    data: {
      taught: {
        path: PICTURES.taught,
        sizes: TRAINED_SIZES,
        assign: 'spread',
        backgrounds: BACKGROUNDS.map((background) => ({
          colour: `#${background.rgb.map((value) => value.toString(16).padStart(2, '0')).join('')}`,
          words: backgroundWords(background),
        })),
        captions: { dropRate: 0.1 },
      },
    },
    stages: [
      {
        name: 'train',
        train: 'diffusion',
        steps: stepsOf(variant),
        batch: 32,
        learningRate: { peak: variant.learningRate, schedule: 'cosine', warmup: 100, end: 0.05 },
        optimizer: { beta2: 0.99 },
        average: { decay: 0.98, every: 10 },
        positions: { randomCrop: variant.crops ? 1 : 0 },
        attentionLogits: true,
      },
    ],
    validation: { every: 250, share: 0.05 },
    export: { file: modelFile(variant, seed), defaults: { width: 96, height: 96, steps: 20, cfg: 3, skipLayers: [1] } },
  };
}

const runName = ({ name }: Variant, seed: number) => `${name}-${seed}`;
const modelFile = (variant: Variant, seed: number) => join(WORK, `${runName(variant, seed)}.safetensors`);

/** How a run trained. */
interface Course {
  readonly validation: number;
  readonly largestLogit: number;
  readonly lastLogit: number;
  /** Step at which it stopped, where a loss was no longer a number. */
  readonly diverged?: number;
  /** Mean loss over the last tenth of the steps over the lowest such mean: above 1 where training has come undone. */
  readonly setback: number;
  readonly secondsAStep: number;
}

async function trainAndRead(variant: Variant, seed: number): Promise<Course> {
  const name = runName(variant, seed);
  const path = join(WORK, `${name}.json`);
  await mkdir(WORK, { recursive: true });
  await writeFile(path, JSON.stringify(configOf(variant, seed)));
  if (!existsSync(modelFile(variant, seed))) {
    // A run that diverges ends with an error, which is a result here.
    await main(['train', path, '--quiet']).catch(() => undefined);
  }
  const events = await readTrainLog(join(WORK, name, 'log.jsonl'));
  const steps = events.filter((event): event is StepEvent => event.type === 'step');
  const window = Math.ceil(stepsOf(variant) / 10);
  const means = steps.map((_, i) => mean(steps.slice(Math.max(0, i + 1 - window), i + 1).map(({ loss }) => loss)));
  const logits = steps.map(({ metrics }) => metrics?.[ATTENTION_LOGIT] ?? Number.NaN);
  const validation = events.findLast((event) => event.type === 'validation');
  return {
    validation: validation?.type === 'validation' ? validation.mean : Number.NaN,
    largestLogit: Math.max(...logits),
    lastLogit: logits.at(-1)!,
    ...(steps.length < stepsOf(variant) && { diverged: steps.length + 1 }),
    setback: means.at(-1)! / Math.min(...means.slice(window)),
    secondsAStep: median(steps.map(({ seconds }) => seconds)),
  };
}

/** How often the nearest training picture is of the object asked for, at a size. */
interface Score {
  readonly top1: number;
  readonly top5: number;
}

let libraries: Map<string, Library> | undefined;

async function score(
  sd: StableDiffusion,
  [width, height]: Size,
  skipLayers: boolean,
): Promise<{ score: Score; images: GeneratedImage[] }> {
  if (!libraries) {
    const pictures = await loadPictures({ size: 64, cacheFolder: CACHE });
    libraries = new Map(BACKGROUNDS.map((background) => [background.name, buildLibrary(pictures, background)]));
  }
  const ranks: number[] = [];
  const images: GeneratedImage[] = [];
  for (const [i, { object, objectIndex, style, background }] of PROMPTS.entries()) {
    const prompt = canonicalPrompt(object, style, background);
    const [image] = await sd.generate({ prompt, width, height, seed: i, skipLayerGuidance: skipLayers });
    images.push(image!);
    const square = centreSquare(image!);
    const { data } = tensorFromImage(square);
    ranks.push(rankOf(objectIndex, rankObjects(data, square.height, square.width, libraries.get(background.name)!)));
  }
  const share = (within: number) => ranks.filter((rank) => rank <= within).length / ranks.length;
  return { score: { top1: share(1), top5: share(5) }, images };
}

/** The measure compares squares; objects stand in the middle. */
function centreSquare({ width, height, data }: GeneratedImage): { width: number; height: number; data: Uint8Array } {
  const side = Math.min(width, height);
  const [left, top] = [Math.floor((width - side) / 2), Math.floor((height - side) / 2)];
  const square = new Uint8Array(3 * side * side);
  for (let row = 0; row < side; row++) {
    const start = 3 * ((top + row) * width + left);
    square.set(data.subarray(start, start + 3 * side), 3 * row * side);
  }
  return { width: side, height: side, data: square };
}

interface Result {
  readonly variant: string;
  readonly seed: number;
  readonly course: Course;
  /** By size, as 96x96; those with skip-layer guidance end in `+slg`. */
  readonly scores: Readonly<Record<string, Score>>;
}

await preparePictures();
await mkdir(OUTPUT, { recursive: true });
const results: Result[] = [];
for (const seed of SEEDS) {
  for (const variant of VARIANTS) {
    const kept = join(WORK, `${runName(variant, seed)}.result.json`);
    if (existsSync(kept)) {
      results.push(JSON.parse(await readFile(kept, 'utf8')));
      continue;
    }
    const course = await trainAndRead(variant, seed);
    const scores: Record<string, Score> = {};
    if (course.diverged === undefined) {
      const sd = await load(modelFile(variant, seed), { device: 'cpu' });
      const rows: GeneratedImage[][] = [];
      for (const size of [...TRAINED_SIZES, ...OTHER_SIZES]) {
        const { score: plain, images } = await score(sd, size, false);
        scores[size.join('x')] = plain;
        rows.push(SHOWN.map((i) => images[i]!));
        if (variant === BASE) scores[`${size.join('x')}+slg`] = (await score(sd, size, true)).score;
      }
      await sd.dispose();
      if (seed === SEEDS[0]) await drawRows(rows, join(OUTPUT, `${variant.name}.png`));
    }
    const result: Result = { variant: variant.name, seed, course, scores };
    await writeFile(kept, JSON.stringify(result));
    results.push(result);
    console.log(JSON.stringify(result));
  }
}
await writeFile(join(OUTPUT, 'results.json'), `${JSON.stringify({ steps: STEPS, results }, null, 2)}\n`);
await writeFile(join(OUTPUT, 'README.md'), report(results));

/** Pictures side by side, the sizes beneath each other. */
async function drawRows(rows: readonly (readonly GeneratedImage[])[], path: string): Promise<void> {
  const tiles: OverlayOptions[] = [];
  let top = 0;
  let widest = 0;
  for (const row of rows) {
    let left = 0;
    for (const { data, width, height } of row) {
      tiles.push({ input: Buffer.from(data), raw: { width, height, channels: 3 }, left, top });
      left += width + 4;
    }
    widest = Math.max(widest, left);
    top += Math.max(...row.map(({ height }) => height)) + 4;
  }
  await sharp({ create: { width: widest, height: top, channels: 3, background: '#fff' } })
    .composite(tiles)
    .png()
    .toFile(path);
}

function report(all: readonly Result[]): string {
  const sizes = [...TRAINED_SIZES, ...OTHER_SIZES].map((size) => size.join('x'));
  const of = (name: string) => all.filter(({ variant }) => variant === name);
  const spread = (values: readonly number[], digits: number) =>
    values.length === 0
      ? ''
      : `${mean(values).toFixed(digits)} (${values.map((value) => value.toFixed(digits)).join(', ')})`;
  const percents = (values: readonly number[]) =>
    values.length === 0
      ? '-'
      : `${Math.round(100 * mean(values))} % (${values.map((value) => Math.round(100 * value)).join(', ')})`;
  const table = (head: readonly string[], rows: readonly (readonly string[])[]) =>
    [head, head.map(() => '---'), ...rows].map((cells) => `| ${cells.join(' | ')} |`).join('\n');
  const top5 = (name: string, key: string) => of(name).flatMap(({ scores }) => scores[key]?.top5 ?? []);
  const courses = VARIANTS.map(({ name, title }) => {
    const runs = of(name).map(({ course }) => course);
    return [
      title,
      spread(runs.map(({ validation }) => validation).filter(Number.isFinite), 3),
      spread(
        runs.map(({ largestLogit }) => largestLogit),
        0,
      ),
      spread(
        runs.map(({ setback }) => setback),
        2,
      ),
      runs.map(({ diverged }) => (diverged === undefined ? 'no' : `step ${diverged}`)).join(', '),
    ];
  });
  const drawn = VARIANTS.filter(({ learningRate }) => learningRate === RATE).map(({ name, title }) => [
    title,
    ...sizes.map((size) => percents(top5(name, size))),
  ]);
  const guided = [
    ['without skip-layer guidance', ...sizes.map((size) => percents(top5('base', size)))],
    ['with it', ...sizes.map((size) => percents(top5('base', `${size}+slg`)))],
  ];
  return `# Ablations

Each run trains a transformer of ${DEPTH} blocks, width ${WIDTH}, from nothing for the compute of ${STEPS} steps of 32 pictures of
${TRAINED_SIZES.map((size) => size.join('x')).join(' and ')} pixels, on the shipped model's autoencoder and text encoders. Cells have the mean over the seeds
${SEEDS.join(', ')} and, in brackets, each of them. \`npm run ablations\` repeats them; all figures are in [results.json](results.json).

## Training

Validation loss; the largest attention logit during training; the loss at the end over its lowest (means over a tenth of
the steps); whether the loss ever was not a number.

${table(['run', 'validation', 'largest logit', 'end / lowest', 'diverged'], courses)}

## Pictures: top-5 of ${PROMPTS.length} prompts by size

The first ${TRAINED_SIZES.length} sizes are trained on, the others never seen. One prompt is ${(100 / PROMPTS.length).toFixed(0)} %.

${table(['run', ...sizes], drawn)}

${table(['as published', ...sizes], guided)}

Pictures of the first seed, four prompts, sizes from the top as in the table:

${VARIANTS.map(({ name, title }) => `${title}:\n\n![${title}](${name}.png)`).join('\n\n')}
`;
}

function mean(values: readonly number[]): number {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

function median(values: readonly number[]): number {
  return [...values].sort((a, b) => a - b)[values.length >> 1]!;
}
