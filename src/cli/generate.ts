/** `mmditx generate`: a prompt to PNG files. */

import { access, constants, mkdir, readFile, stat } from 'node:fs/promises';
import { dirname } from 'node:path';
import { type Command, InvalidArgumentError, Option } from 'commander';
import { MmditxError } from '../errors.ts';
import { outputPath, readImageFile, writePng } from '../image/files.node.ts';
import { imageHash, maskFromImage, type RgbImage } from '../image/image.ts';
import { type GenerationSettings, settingsFromPng } from '../image/settings.ts';
import { terminalGraphics, terminalPicture } from '../image/terminal.node.ts';
import { load } from '../index.node.ts';
import type { GenerateOptions } from '../pipeline/options.ts';
import type { GeneratedImage, StableDiffusion } from '../pipeline/pipeline.ts';
import type { SkipLayerGuidance } from '../sampling/guidance.ts';
import type { DenoiseRule } from '../sampling/schedules.ts';
import type { FloatTensor } from '../tensor/data.ts';
import type { PromptSyntax } from '../text/prompt-weights.ts';
import { ioError } from '../weights/atomic.node.ts';
import type { Context } from './context.ts';
import { createProgress } from './progress.ts';
import * as values from './values.ts';

interface Flags extends values.SamplingFlags, values.DeviceFlags {
  readonly negative?: string;
  readonly size?: values.Size;
  readonly width?: number;
  readonly height?: number;
  readonly slg?: true | number[];
  readonly seed?: number | bigint;
  readonly batch?: number;
  readonly initImage?: string;
  readonly mask?: string;
  readonly strength?: number;
  readonly denoiseRule?: DenoiseRule;
  readonly from?: string;
  readonly output?: string;
  readonly overwrite?: true;
  readonly model?: string[];
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
/** Sides of pictures are multiples of this, so a picture to start from is cut to them. */
const SIZE_UNIT = 16;

const EXAMPLES = `
Examples:
  $ mmditx generate "3d fox on a teal background" --seed 7 --output fox.png
  $ mmditx generate "a castle" --batch 4 --output "castles/{seed}-{index}.png"
  $ mmditx generate "cartoon fox" --init-image fox.png --strength 0.6
  $ mmditx generate --from fox.png`;

export function addGenerate(program: Command, context: Context): void {
  const command = program
    .command('generate')
    .description('Draw pictures from a prompt. Options left out have the model’s own values.')
    .argument('[prompt]', 'what to draw; (word:1.2), ((word)) and [word] weigh words')
    .option('--negative <prompt>', 'what to keep away from')
    .option('--size <WxH>', 'size in pixels, multiples of 16', values.size)
    .option('--width <pixels>', 'width alone', values.wholeNumber)
    .option('--height <pixels>', 'height alone', values.wholeNumber)
    .option('--seed <number>', 'same seed, same picture (default: random)', values.seed)
    .option('--batch <count>', 'pictures made at once', values.wholeNumber);
  values
    .addSamplingOptions(command)
    .option('--slg [layers]', 'skip-layer guidance, on the model’s layers or these, such as 7,8,9', values.layers)
    .option('--init-image <file>', 'picture to start from')
    .option('--strength <share>', 'share of it that is redrawn, above 0 to 1', values.decimal)
    .addOption(
      new Option('--denoise-rule <rule>', 'how the strength shortens the schedule').choices([
        'stability',
        'comfyui',
        'diffusers',
      ]),
    )
    .option('--mask <file>', 'repaint only what is white in this picture')
    .option('--from <png>', 'settings of a picture made before; other options change them')
    .option(
      '--output <pattern>',
      `file to write, with {seed} {index} {width} {height} {prompt} (default: "${DEFAULT_OUTPUT}")`,
    )
    .option('--overwrite', 'replace files that exist')
    .option('--model <file>', 'checkpoint, or several files that make one (default: the small model)', values.repeated)
    .option('--clip-tokenizer <file>', 'tokenizer.json of CLIP, for checkpoints without one')
    .option('--t5-tokenizer <file>', 'tokenizer.json of T5, for checkpoints without one')
    .addOption(new Option('--prompt-syntax <name>', 'how brackets are read').choices(['comfy', 'a1111', 'none']))
    .addOption(new Option('--long-prompt <how>', 'prompts over CLIP’s length').choices(['chunk', 'truncate']))
    .option('--t5-tokens <count>', 'pad or cut T5’s tokens to this length, such as 256', positive)
    .option('--no-show', 'do not show the picture in the terminal')
    .option('--quiet', 'no progress')
    .option('--json', 'a line of JSON for each picture instead of its path')
    .addHelpText('after', EXAMPLES)
    .action((prompt: string | undefined) => generate(prompt, command.opts(), context));
  values.addDeviceOptions(command);
}

function positive(text: string): number {
  const count = values.wholeNumber(text);
  if (count < 1) throw new InvalidArgumentError('Give a number of 1 or more.');
  return count;
}

async function generate(prompt: string | undefined, flags: Flags, context: Context): Promise<void> {
  const { stdout, stderr, signal } = context;
  const previous = flags.from === undefined ? undefined : await settingsOf(flags.from);
  if (prompt === undefined && previous?.prompt === undefined) {
    throw new MmditxError('bad-option', 'There is no prompt; say what to draw: mmditx generate "a red fox".');
  }
  const pattern = flags.output ?? DEFAULT_OUTPUT;
  await requireWritable(pattern);

  const progress = createProgress(stderr, { quiet: flags.quiet });
  const started = performance.now();
  if (!flags.quiet && stderr.isTTY) progress.say('Loading the model ...');
  const sd = await load(flags.model, {
    ...values.defined({
      device: flags.device,
      threads: flags.threads,
      clipTokenizer: flags.clipTokenizer,
      t5Tokenizer: flags.t5Tokenizer,
    }),
  });
  try {
    const options = { ...(await completeOptions(prompt, flags, previous, sd, progress.say)), signal };
    let images: readonly GeneratedImage[] = [];
    try {
      for await (const event of sd.stream(options)) {
        if (event.type === 'warning') progress.say(`Warning: ${event.message}`);
        if (event.type === 'step') progress.step(event.step, event.steps);
        if (event.type === 'images') images = event.images;
      }
    } finally {
      progress.stop();
    }
    if (previous?.model && flags.from) requireSameModel(flags, previous.model, images[0]!.settings.model);
    // A picture repeated from a batch is one of it: the whole batch was drawn so that every bit is the same.
    const wanted = previous?.batch && !flags.batch ? images.filter((_, i) => i === previous.batch!.index) : images;
    const seconds = (performance.now() - started) / 1000;
    for (const image of wanted) {
      const { seed, width, height, batch } = image.settings;
      const naming = { seed, index: batch.index, count: wanted.length, width, height, prompt: image.settings.prompt };
      const path = outputPath(pattern, naming, { overwrite: flags.overwrite ?? false });
      await writePng(path, image.png());
      stdout.write(flags.json ? `${resultLine(path, image, seconds)}\n` : `${path}\n`);
      if (flags.show && !flags.json) show(image, context);
    }
  } finally {
    await sd.dispose();
  }
}

/** A line for other programs. */
function resultLine(path: string, { settings }: GeneratedImage, seconds: number): string {
  const plain = (_key: string, value: unknown) => (typeof value === 'bigint' ? value.toString() : value);
  return JSON.stringify({ path, seed: settings.seed, seconds: Number(seconds.toFixed(3)), settings }, plain);
}

function show(image: RgbImage, { stdout, environment }: Context): void {
  const graphics = terminalGraphics(environment, stdout.isTTY ?? false);
  if (graphics !== 'none') stdout.write(terminalPicture(graphics, image, values.defined(stdout)));
}

/** Settings of a picture made before; those of other programs are fewer. */
type Previous = Partial<GenerationSettings>;

async function settingsOf(path: string): Promise<Previous> {
  const bytes = await readFile(path).catch((cause) => {
    throw ioError('read', path, cause);
  });
  const found = settingsFromPng(bytes);
  if (!found) {
    throw new MmditxError('bad-file', `${path} carries no settings; give a PNG file made by mmditx or A1111's web UI.`);
  }
  return found.settings as Previous;
}

/** Options of the command line over those of a picture made before. */
async function completeOptions(
  prompt: string | undefined,
  flags: Flags,
  previous: Previous | undefined,
  sd: StableDiffusion,
  say: (text: string) => void,
): Promise<GenerateOptions> {
  const size = {
    width: flags.width ?? flags.size?.width ?? previous?.width,
    height: flags.height ?? flags.size?.height ?? previous?.height,
  };
  const { image, mask } = await inputPictures(flags, previous, size, say);
  const batchSize = flags.batch ?? previous?.batch?.size;
  return {
    prompt: prompt ?? previous!.prompt!,
    ...values.defined({
      negativePrompt: flags.negative ?? previous?.negativePrompt,
      width: image?.width ?? size.width,
      height: image?.height ?? size.height,
      steps: flags.steps ?? previous?.steps,
      cfg: flags.cfg ?? previous?.cfg,
      sampler: flags.sampler ?? previous?.sampler,
      scheduler: flags.scheduler ?? previous?.scheduler,
      shift: flags.shift ?? previous?.shift,
      seed: flags.seed ?? previous?.seed,
      batchSize,
      skipLayerGuidance: skipLayerGuidance(flags, previous, sd),
      initImage: image,
      mask,
      strength: flags.strength ?? previous?.initImage?.strength,
      denoiseRule: flags.denoiseRule ?? previous?.initImage?.denoiseRule,
      promptSyntax: flags.promptSyntax ?? previous?.promptSyntax,
      longPrompt: flags.longPrompt ?? previous?.longPrompt,
      t5Tokens: flags.t5Tokens ? { length: flags.t5Tokens } : previous?.t5Tokens,
    }),
  };
}

/** Any of the options of skip-layer guidance switches it on. */
function skipLayerGuidance(
  { slg, slgScale, slgStart, slgEnd, slgRule }: Flags,
  previous: Previous | undefined,
  sd: StableDiffusion,
): SkipLayerGuidance | undefined {
  const layers = Array.isArray(slg) ? slg : undefined;
  const changed = values.defined({ layers, scale: slgScale, start: slgStart, end: slgEnd, rule: slgRule });
  if (!slg && Object.keys(changed).length === 0) return previous?.skipLayerGuidance ?? undefined;
  return { ...sd.defaults.skipLayer, ...(previous?.skipLayerGuidance ?? {}), ...changed };
}

/** The picture to start from and the mask, cut to the size asked for, or to their own rounded down. */
async function inputPictures(
  flags: Flags,
  previous: Previous | undefined,
  { width, height }: { width: number | undefined; height: number | undefined },
  say: (text: string) => void,
): Promise<{ image?: RgbImage; mask?: FloatTensor }> {
  if (flags.mask && !flags.initImage) {
    throw new MmditxError('bad-option', 'A mask needs a picture to repaint; give it with --init-image.');
  }
  if (!flags.initImage) {
    if (!previous?.initImage) return {};
    throw new MmditxError('bad-option', `${flags.from} was drawn over another picture; give that with --init-image.`);
  }
  const original = await readImageFile(flags.initImage);
  const rounded = (side: number) => Math.max(SIZE_UNIT, Math.floor(side / SIZE_UNIT) * SIZE_UNIT);
  const size = { width: width ?? rounded(original.width), height: height ?? rounded(original.height) };
  const fits = size.width === original.width && size.height === original.height;
  if (!fits) say(`${flags.initImage} is scaled and cut to ${size.width}x${size.height}.`);
  const image = fits ? original : await readImageFile(flags.initImage, { size });
  await requireSamePicture(flags, image, previous?.initImage?.sha256);
  if (!flags.mask) return { image };
  return { image, mask: maskFromImage(await readImageFile(flags.mask, { size })) };
}

async function requireSamePicture({ from, initImage }: Flags, image: RgbImage, expected?: string): Promise<void> {
  if (expected !== undefined && expected !== (await imageHash(image))) {
    throw new MmditxError('bad-option', `${from} was drawn over another picture than ${initImage}.`);
  }
}

function requireSameModel(
  { from, model }: Flags,
  expected: GenerationSettings['model'],
  { hash, name }: GenerationSettings['model'],
): void {
  // A model given by hand is meant to differ.
  if (model || expected.hash === null || expected.hash === hash) return;
  throw new MmditxError(
    'bad-option',
    `${from} was made with another model (${expected.name}) than ${name}; give it with --model.`,
  );
}

/** Makes sure before the work starts that a file can be written where the pattern points. */
async function requireWritable(pattern: string): Promise<void> {
  const naming = { seed: 0, index: 0, count: 1, width: 0, height: 0, prompt: '' };
  const path = outputPath(pattern, naming, { overwrite: true });
  // Folders with placeholders are made when their names are known.
  if (/\{/.test(dirname(pattern))) return;
  const folder = dirname(path);
  try {
    await mkdir(folder, { recursive: true });
    await access(folder, constants.W_OK);
    if ((await stat(path).catch(() => undefined))?.isDirectory()) throw Object.assign(new Error(), { code: 'EISDIR' });
  } catch (cause) {
    throw ioError('write', path, cause);
  }
}
