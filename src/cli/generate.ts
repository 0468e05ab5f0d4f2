/** `mmditx generate`: pictures from words. */

import { basename, join } from 'node:path';
import { type Command, Option } from 'commander';
import { MmditxError } from '../errors.ts';
import { type OutputValues, outputPath, writePng } from '../image/files.node.ts';
import { encodePng } from '../image/png.ts';
import { formatSettings, type GenerationSettings } from '../image/settings.ts';
import { terminalGraphics, terminalPicture } from '../image/terminal.node.ts';
import { type GenerateOptions, type LoraUse, load, readLora, SMALL_MODEL } from '../index.node.ts';
import type { GeneratedImage, GenerationEvent, StableDiffusion } from '../pipeline/pipeline.ts';
import type { SkipLayerGuidance } from '../sampling/guidance.ts';
import type { DenoiseRule } from '../sampling/schedules.ts';
import type { PromptSyntax } from '../text/prompt-weights.ts';
import { conversionTitle } from '../weights/converted.node.ts';
import { quote } from '../weights/quote.ts';
import type { Context } from './context.ts';
import {
  deviceFromPicture,
  modelDifference,
  optionsFromPicture,
  precisionFromPicture,
  readPictureSettings,
} from './from-picture.ts';
import { type InitialPicture, readInitialPicture, requireSamePictures } from './initial-picture.ts';
import { createProgress, type Progress } from './progress.ts';
import {
  addDeviceOptions,
  addPrecisionOption,
  addSamplingOptions,
  type DeviceFlags,
  decimal,
  defined,
  type LoraFlag,
  layers,
  loraFile,
  type PrecisionFlags,
  repeated,
  type SamplingFlags,
  type Size,
  seed,
  size,
  wholeNumber,
} from './values.ts';
import { makeFolderOf, requireWritable } from './writable.ts';

interface GenerateFlags extends SamplingFlags, DeviceFlags, PrecisionFlags {
  readonly negative?: string;
  readonly size?: Size;
  readonly width?: number;
  readonly height?: number;
  readonly seed?: number | bigint;
  readonly batch?: number;
  /** `true` without layers, `false` for `--no-slg`. */
  readonly slg?: boolean | readonly number[];
  /** `true` without a threshold, `false` for `--no-step-cache`. */
  readonly stepCache?: boolean | number;
  readonly initImage?: string;
  readonly mask?: string;
  readonly strength?: number;
  readonly denoiseRule?: DenoiseRule;
  readonly from?: string;
  readonly output: string;
  readonly overwrite?: true;
  readonly preview?: string;
  readonly model?: readonly string[];
  readonly lora?: readonly LoraFlag[];
  readonly loraDir?: string;
  readonly cache?: string;
  readonly clipTokenizer?: string;
  readonly t5Tokenizer?: string;
  readonly promptSyntax?: PromptSyntax;
  readonly longPrompt?: 'chunk' | 'truncate';
  readonly t5Tokens?: number;
  readonly show: boolean;
  readonly quiet?: true;
  readonly json?: true;
}

const DEFAULT_OUTPUT = 'mmditx-{seed}-{index}.png';

export function addGenerate(program: Command, context: Context): void {
  const command = program
    .command('generate')
    .description('draw pictures; the paths written are printed')
    .argument('[prompt]', 'what to draw; (word:1.2) weighs a word')
    .option('-n, --negative <prompt>', 'what to keep away from')
    .addOption(new Option('--size <WxH>', 'size in pixels').argParser(size).conflicts(['width', 'height']))
    .option('--width <pixels>', 'width alone', wholeNumber)
    .option('--height <pixels>', 'height alone', wholeNumber)
    .option('-s, --seed <number>', 'where the noise comes from (default: random)', seed)
    .option('-b, --batch <count>', 'pictures made at once (default: 1)', wholeNumber)
    .optionsGroup('Sampling:')
    .option('--slg [layers]', 'skip-layer guidance, with other layers than the default ones as in --slg 7,8', layers)
    .option('--no-slg', 'none, where --from would have some')
    .option(
      '--step-cache [threshold]',
      'reuse work of earlier steps: faster, not quite the same picture; 0 to 1 (default: off; without a number: 0.1)',
      decimal,
    )
    .option('--no-step-cache', 'none, where --from would have one');
  addSamplingOptions(command)
    .optionsGroup('From pictures:')
    .option('-i, --init-image <file>', 'picture to redraw, scaled and cut to the size')
    .option('--mask <file>', 'what of it is repainted: white is, black is kept')
    .option('--strength <share>', 'how much of it is redrawn, above 0 to 1', decimal)
    .addOption(
      new Option('--denoise-rule <name>', 'whose way of shortening the schedule for that').choices([
        'stability',
        'comfyui',
        'diffusers',
      ]),
    )
    .option('--from <picture>', 'take the settings from a picture; options given besides change them')
    .optionsGroup('Prompts:')
    .addOption(new Option('--prompt-syntax <name>', 'how brackets are read').choices(['a1111', 'comfy', 'none']))
    .addOption(new Option('--long-prompt <way>', 'what happens beyond 77 tokens').choices(['chunk', 'truncate']))
    .option('--t5-tokens <count>', 'tokens for T5, such as 256 (default: at least 77)', wholeNumber)
    .optionsGroup('Model:')
    .option(
      '-m, --model <file>',
      'checkpoint or folder; repeat it for models in several files (default: the small one)',
      repeated,
    )
    .option('--lora <file[:strength]>', 'LoRA, such as style.safetensors:0.8; repeat it for several', loraFile)
    .option('--lora-dir <folder>', 'where <lora:name:0.8> in a prompt finds name.safetensors')
    .option('--clip-tokenizer <file>', "CLIP's tokenizer.json, where the model brings none")
    .option('--t5-tokenizer <file>', "T5's");
  addPrecisionOption(addDeviceOptions(command))
    .option('--cache <folder>', 'where converted weights are kept (default: MMDITX_CACHE or your cache folder)')
    .optionsGroup('Output:')
    .option('-o, --output <pattern>', 'path with {seed} {index} {width} {height} {prompt}', DEFAULT_OUTPUT)
    .option('--overwrite', 'replace existing files instead of numbering new ones')
    .option('--preview <file>', 'PNG that shows the first picture so far after every step')
    .option('--no-show', 'do not show pictures in the terminal')
    .option('-q, --quiet', 'no progress, only warnings and errors')
    .option('--json', 'print a line of JSON for each picture instead of its path')
    .addHelpText(
      'after',
      `
Defaults are the model's own; those of Stable Diffusion 3.5 Medium are Stability AI's.

Examples:
  mmditx generate "a red fox in the snow" --seed 7 --batch 4
  mmditx generate "a red fox" --model sd3.5_medium.safetensors --size 1024x768 --slg
  mmditx generate "a red fox" --init-image sketch.jpg --strength 0.6
  mmditx generate --from mmditx-7-0.png --steps 60`,
    )
    .action(async (prompt: string | undefined, flags: GenerateFlags) => {
      if (prompt === undefined && flags.from === undefined) {
        throw new MmditxError('bad-option', 'There is no prompt; say what to draw: mmditx generate "a red fox".');
      }
      if (flags.mask !== undefined && flags.initImage === undefined) {
        throw new MmditxError('bad-option', 'A mask needs a picture to repaint; give it with --init-image.');
      }
      const redraws = flags.initImage !== undefined || flags.from !== undefined;
      if (!redraws && (flags.strength !== undefined || flags.denoiseRule !== undefined)) {
        const flag = flags.strength === undefined ? '--denoise-rule' : '--strength';
        throw new MmditxError('bad-option', `${flag} needs a picture to redraw; give it with --init-image.`);
      }
      const progress = createProgress(context.stderr, { quiet: flags.quiet });
      try {
        await generate(prompt, flags, context, progress);
      } finally {
        progress.stop();
      }
    });
}

async function generate(prompt: string | undefined, flags: GenerateFlags, context: Context, progress: Progress) {
  const picture = flags.from === undefined ? undefined : await readPictureSettings(flags.from);
  const original = picture?.source === 'mmditx' ? picture.settings : undefined;
  const paths = flags.model ?? [SMALL_MODEL];
  const device = flags.device ?? deviceFromPicture(original);
  const names = paths.map((path) => basename(path)).join(', ');
  if (!flags.quiet && context.stderr.isTTY) progress.say(`Loading ${names}.`);

  const { clipTokenizer, t5Tokenizer, threads, cache: cacheFolder, loraDir: loraFolder } = flags;
  const precision = flags.precision ?? precisionFromPicture(original);
  const sd = await load(paths, {
    ...defined({ clipTokenizer, t5Tokenizer, device, threads, precision, cacheFolder, loraFolder }),
    // One picture or batch, then the process ends: nothing is gained by keeping what has done its work.
    release: true,
    signal: context.signal,
    onNote: (text) => {
      if (!flags.quiet) progress.say(text);
    },
    onConversion: (conversion) => progress.convert(conversionTitle(conversion), conversion.written, conversion.bytes),
  });
  try {
    const { model } = sd;
    const loras = await readLoras(flags.lora ?? [], original, loraFolder);
    if (original) {
      const difference = modelDifference(original, flags.from!, model);
      if (difference && !flags.model)
        throw new MmditxError('bad-option', `${difference}; give its model with --model.`);
      if (difference) progress.say(`Warning: ${difference}; the new picture will differ.`);
    } else if (picture) {
      progress.say(`Warning: ${flags.from} was made by another program; only settings with a counterpart are taken.`);
    }

    const { width, height } = flags.size ?? flags;
    const base = { ...(picture && optionsFromPicture(picture)), ...defined({ width, height }) };
    let initial: InitialPicture | undefined;
    if (flags.initImage !== undefined) {
      const { initImage, mask } = flags;
      const { width, height } = base;
      initial = await readInitialPicture({ initImage, mask, width, height, unit: sd.sizeUnit });
      if (initial.note && !flags.quiet) progress.say(initial.note);
    }
    if (original) await requireSamePictures(original, initial ?? {});

    const options: GenerateOptions = {
      prompt: '',
      ...base,
      ...optionsFromFlags(prompt, flags, base),
      loras,
      ...(initial && { initImage: initial.initImage }),
      ...(initial?.mask && { mask: initial.mask }),
      signal: context.signal,
    };
    // A picture from a batch is drawn with its batch; the others of it were not asked for.
    const only = original && flags.batch === undefined ? original.batch.index : undefined;
    await draw(sd, { ...options, seed: options.seed ?? randomSeed() }, only, flags, context, progress);
  } finally {
    await sd.dispose();
  }
}

/** The LoRAs given, or else those that a picture was made with, found by their names. */
async function readLoras(
  given: readonly LoraFlag[],
  original: GenerationSettings | undefined,
  folder: string | undefined,
): Promise<LoraUse[]> {
  if (given.length > 0 || !original) {
    return Promise.all(given.map(async ({ path, strength }) => ({ lora: await readLora(path), strength })));
  }
  return Promise.all(
    original.loras.map(async ({ name, ...strengths }) => {
      if (folder === undefined) {
        throw new MmditxError(
          'bad-option',
          `The picture was made with the LoRA ${quote(name)}; give its folder with --lora-dir or the file with --lora.`,
        );
      }
      return { lora: await readLora(join(folder, basename(name))), ...strengths };
    }),
  );
}

function optionsFromFlags(prompt: string | undefined, flags: GenerateFlags, base: Partial<GenerateOptions>) {
  const { steps, cfg, sampler, scheduler, shift, stepCache, strength, denoiseRule, promptSyntax, longPrompt } = flags;
  return defined({
    prompt,
    negativePrompt: flags.negative,
    seed: flags.seed,
    batchSize: flags.batch,
    t5Tokens: flags.t5Tokens === undefined ? undefined : { length: flags.t5Tokens },
    skipLayerGuidance: skipLayerGuidance(flags, base.skipLayerGuidance),
    ...{ steps, cfg, sampler, scheduler, shift, stepCache, strength, denoiseRule, promptSyntax, longPrompt },
  });
}

/** Any option of skip-layer guidance but `--no-slg` switches it on. */
function skipLayerGuidance(
  { slg, slgScale: scale, slgStart: start, slgEnd: end, slgRule: rule }: GenerateFlags,
  base: GenerateOptions['skipLayerGuidance'],
): GenerateOptions['skipLayerGuidance'] {
  if (slg === false) return false;
  const own = defined({ layers: typeof slg === 'object' ? slg : undefined, scale, start, end, rule });
  if (slg === undefined && Object.keys(own).length === 0) return base;
  const changed: Partial<SkipLayerGuidance> = { ...(typeof base === 'object' && base), ...own };
  return changed;
}

/** A number that is short to type, as file names and settings are to hold it. */
function randomSeed(): number {
  return crypto.getRandomValues(new Uint32Array(1))[0]!;
}

/** Draws the pictures and writes them; of a batch only the picture `only`, if given. */
async function draw(
  sd: StableDiffusion,
  options: GenerateOptions & { readonly seed: number | bigint },
  only: number | undefined,
  flags: GenerateFlags,
  { stdout, environment, signal }: Context,
  progress: Progress,
): Promise<void> {
  const size = options.initImage ?? { ...sd.defaults, ...options };
  const count = only === undefined ? (options.batchSize ?? 1) : 1;
  const pathOf = (index: number) => {
    const { prompt, seed } = options;
    const values: OutputValues = { prompt, seed, index, count, width: size.width, height: size.height };
    return outputPath(flags.output, values, { overwrite: flags.overwrite === true });
  };
  await prepare(pathOf(only ?? 0));
  if (flags.preview !== undefined) await prepare(flags.preview);

  const start = performance.now();
  progress.step(0, options.steps ?? sd.defaults.steps);
  let images: readonly GeneratedImage[] = [];
  for await (const event of sd.stream(options)) {
    if (event.type === 'images') images = event.images;
    else if (event.type === 'warning') progress.say(`Warning: ${event.message}`);
    else await reportStep(event, flags, progress);
  }
  signal.throwIfAborted();
  progress.stop();
  const seconds = (performance.now() - start) / 1000;

  const graphics = flags.show && !flags.json ? terminalGraphics(environment, stdout.isTTY === true) : 'none';
  for (const [index, image] of images.entries()) {
    if (only !== undefined && index !== only) continue;
    const path = pathOf(index);
    await writePng(path, image.png());
    stdout.write(terminalPicture(graphics, image, stdout));
    stdout.write(`${flags.json ? describeResult(path, image, seconds) : path}\n`);
  }
}

/** Makes the folder of a file and finds out whether the file can be written. */
async function prepare(path: string): Promise<void> {
  await makeFolderOf(path);
  await requireWritable(path);
}

async function reportStep(
  { step, steps, preview }: GenerationEvent & { type: 'step' },
  flags: GenerateFlags,
  progress: Progress,
): Promise<void> {
  progress.step(step, steps);
  if (flags.preview === undefined) return;
  const [first] = await preview();
  await writePng(flags.preview, encodePng(first!));
}

/** `seconds` are those of the whole batch, from its words to its pixels. */
function describeResult(path: string, { settings }: GeneratedImage, seconds: number): string {
  const plain = JSON.parse(formatSettings(settings)) as { seed: number | string };
  return JSON.stringify({ path, seed: plain.seed, seconds: Number(seconds.toFixed(3)), settings: plain });
}
