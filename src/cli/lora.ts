/** `mmditx lora`: LoRA files merged into a model, joined, made smaller, put in another layout, and described. */

import { realpath } from 'node:fs/promises';
import { type Command, InvalidArgumentError, Option } from 'commander';
import { MmditxError } from '../errors.ts';
import { openFiles } from '../index.node.ts';
import { writeFileAtomically } from '../weights/atomic.node.ts';
import { partNames, partTitles } from '../weights/checkpoint.ts';
import { formatBytes } from '../weights/download.node.ts';
import { type FileSource, fileSource } from '../weights/files.node.ts';
import { type Lora, type LowRank, openLora } from '../weights/lora.ts';
import { joinLoras, mergeLoras } from '../weights/lora-merge.ts';
import { loraLayout } from '../weights/lora-names.ts';
import { type LayerResize, resizeLora } from '../weights/lora-resize.ts';
import {
  LORA_FORMATS,
  type LoraDType,
  type LoraFormat,
  type LoraLayer,
  loraFile,
  loraLayers,
} from '../weights/lora-write.ts';
import { CLIP_TOKENIZER_KEY, T5_TOKENIZER_KEY } from '../weights/metadata.ts';
import { quote } from '../weights/quote.ts';
import {
  openSafetensors,
  plannedSafetensorsBytes,
  plannedSafetensorsChunks,
  type SafetensorsFile,
  safetensorsChunks,
} from '../weights/safetensors.ts';
import type { Context } from './context.ts';
import { createProgress, type Progress } from './progress.ts';
import { decimal, type LoraFlag, loraFile as loraFlag, wholeNumber } from './values.ts';
import { makeFolderOf, requireRoom, requireWritable } from './writable.ts';

export function addLora(program: Command, context: Context): void {
  const lora = program.command('lora').description('merge, combine, resize, convert and describe LoRA files');
  addMerge(lora, context);
  addCombine(lora, context);
  addResize(lora, context);
  addLayout(lora, context);
  addInfo(lora, context);
}

interface MergeFlags {
  readonly lora: readonly LoraFlag[];
  readonly output: string;
  readonly quiet?: true;
}

function addMerge(program: Command, context: Context): void {
  program
    .command('merge')
    .description('write a model with LoRAs in its weights, all parts in one file')
    .argument('<model...>', 'the model: a file, all its files, or a folder')
    .requiredOption('--lora <file[:strength]>', 'LoRA, such as style.safetensors:0.8; repeat it for several', loraFlag)
    .requiredOption('-o, --output <file>', 'safetensors file to write')
    .option('-q, --quiet', 'no progress')
    .addHelpText(
      'after',
      `
Weights keep their number format; those in 8 bits or less become 16 bits where a LoRA changes them.

Example:
  mmditx lora merge sd3.5_medium.safetensors --lora style.safetensors:0.8 -o sd3.5-style.safetensors`,
    )
    .action(async (paths: string[], { lora: flags, output, quiet }: MergeFlags) => {
      const progress = createProgress(context.stderr, { quiet });
      const opened = await openLoras(flags.map(({ path }) => path));
      try {
        const model = await openFiles(paths, quiet ? {} : { onNote: progress.say });
        try {
          await requireOther(output, [...model.sources, ...opened.map(({ source }) => source)]);
          const { parts, tokenizers } = model.checkpoint;
          const merged = mergeLoras(parts, withStrengths(opened, flags));
          const metadata = {
            ...merged.metadata,
            ...(tokenizers.clip !== undefined && { [CLIP_TOKENIZER_KEY]: tokenizers.clip }),
            ...(tokenizers.t5 !== undefined && { [T5_TOKENIZER_KEY]: tokenizers.t5 }),
          };
          const bytes = plannedSafetensorsBytes(merged.plans, metadata);
          await makeFolderOf(output);
          await requireWritable(output);
          await requireRoom(output, bytes);
          let written = 0;
          const reported = async function* () {
            for await (const chunk of plannedSafetensorsChunks(merged.plans, metadata)) {
              yield chunk;
              written += chunk.length;
              progress.convert('Merging', written, bytes);
            }
          };
          await writeFileAtomically(output, reported(), { signal: context.signal });
          if (!quiet)
            sayMerged(
              progress,
              merged,
              partNames.filter((part) => !parts[part]).map((part) => partTitles[part]),
            );
          context.stdout.write(`${output}\n`);
        } finally {
          await model.close();
        }
      } finally {
        progress.stop();
        await closeAll(opened);
      }
    });
}

function sayMerged(
  progress: Progress,
  { changed, widened, absent }: ReturnType<typeof mergeLoras>,
  missing: readonly string[],
): void {
  progress.say(`${changed} ${changed === 1 ? 'weight is' : 'weights are'} changed.`);
  if (widened > 0) {
    progress.say(
      `${widened} of them were stored in 8 bits or less and are in 16 bits now; merge into the model in 16 bits and convert that for the best result.`,
    );
  }
  for (const part of absent) {
    progress.say(`The changes of the ${partTitles[part]} are left out, as the model's files do not hold it.`);
  }
  if (missing.length > 0) progress.say(`Not in it: ${missing.join(', ')}.`);
}

interface WriteFlags {
  readonly output: string;
  readonly format?: LoraFormat;
  readonly dtype?: LoraDType;
  readonly quiet?: true;
}

/** The options of all commands that write a LoRA. */
function addWriteOptions(command: Command, format: string): Command {
  return command
    .requiredOption('-o, --output <file>', 'safetensors file to write')
    .addOption(new Option('--format <name>', `kohya or diffusers (default ${format})`).choices([...LORA_FORMATS]))
    .option('--dtype <name>', 'fp16, bf16 or fp32 (default as it is)', numberFormat)
    .option('-q, --quiet', 'no progress');
}

const numberFormats: Readonly<Record<string, LoraDType>> = { fp16: 'float16', bf16: 'bfloat16', fp32: 'float32' };

function numberFormat(text: string): LoraDType {
  const dtype = Object.hasOwn(numberFormats, text) ? numberFormats[text] : undefined;
  if (!dtype) throw new InvalidArgumentError(`give one of ${Object.keys(numberFormats).join(', ')}`);
  return dtype;
}

interface ResizeFlags extends WriteFlags {
  readonly rank?: number;
  readonly keep?: number;
  readonly maxRank?: number;
  readonly details?: true;
}

/** The options of all commands that can lower ranks. */
function addRankOptions(command: Command): Command {
  return command
    .option('--rank <number>', 'ranks to keep in each layer', wholeNumber)
    .option('--keep <share>', 'share of each change to keep at least, such as 0.95 (of its Frobenius norm)', decimal)
    .option('--max-rank <number>', 'most ranks that --keep may take', wholeNumber)
    .option('--details', 'tell the rank of each layer and the share that is kept');
}

function addResize(program: Command, context: Context): void {
  const command = program.command('resize').description('write a LoRA of lower rank').argument('<file>', 'the LoRA');
  addWriteOptions(addRankOptions(command), "the file's")
    .addHelpText(
      'after',
      `
Example:
  mmditx lora resize style.safetensors --rank 8 -o style-8.safetensors`,
    )
    .action(async (path: string, flags: ResizeFlags) => {
      await rewrite([path], flags, context, ([opened], progress) => resized(loraLayers(opened!.lora), flags, progress));
    });
}

/** Layers of lower rank, told about. */
function resized(layers: readonly LoraLayer[], flags: ResizeFlags, progress: Progress): LoraLayer[] {
  const { rank, keep, maxRank } = flags;
  const result = resizeLora(layers, { rank, keep, maxRank }, (done, total) =>
    progress.convert('Resizing', done, total),
  );
  if (!flags.quiet) for (const line of resizeLines(result.report, flags.details === true)) progress.say(line);
  return result.layers;
}

function resizeLines(report: readonly LayerResize[], details: boolean): string[] {
  const share = (kept: number) => `${(100 * kept).toFixed(1)} %`;
  const kept = report.map((layer) => layer.kept);
  const worst = report.reduce((least, layer) => (layer.kept < least.kept ? layer : least));
  const mean = kept.reduce((sum, value) => sum + value, 0) / kept.length;
  return [
    ...(details
      ? report.map(({ weight, from, to, kept }) => `${weight}: rank ${from} to ${to}, keeps ${share(kept)}`)
      : []),
    `Rank ${range(report.map(({ from }) => from))} to ${range(report.map(({ to }) => to))}: keeps ${share(mean)} of the changes in the mean, ${share(worst.kept)} at least (${worst.weight}).`,
  ];
}

function addLayout(program: Command, context: Context): void {
  const command = program
    .command('convert')
    .description('write a LoRA in another layout')
    .argument('<file>', 'the LoRA');
  addWriteOptions(command, 'kohya')
    .addHelpText(
      'after',
      `
ComfyUI and the web UIs read both layouts, diffusers its own.

Example:
  mmditx lora convert style.safetensors --format diffusers -o style-diffusers.safetensors`,
    )
    .action(async (path: string, flags: WriteFlags) => {
      const chosen = { ...flags, format: flags.format ?? 'kohya' } as const;
      await rewrite([path], chosen, context, ([opened]) => loraLayers(opened!.lora));
    });
}

function addCombine(program: Command, context: Context): void {
  const command = program
    .command('combine')
    .description('write several LoRAs as one, of the sum of their ranks or resized')
    .argument('<file[:strength]...>', 'the LoRAs, such as style.safetensors:0.8', loraFlag);
  addWriteOptions(addRankOptions(command), "the first file's")
    .addHelpText(
      'after',
      `
Example:
  mmditx lora combine style.safetensors:0.8 person.safetensors --keep 0.98 -o both.safetensors`,
    )
    .action(async (loras: readonly LoraFlag[], flags: ResizeFlags) => {
      const paths = loras.map(({ path }) => path);
      await rewrite(paths, flags, context, (opened, progress) => {
        const layers = joinLoras(withStrengths(opened, loras));
        const asked = flags.rank !== undefined || flags.keep !== undefined || flags.maxRank !== undefined;
        return asked ? resized(layers, flags, progress) : layers;
      });
    });
}

/** Reads LoRAs, makes the layers of another and writes it in the first one's layout and number format, if not told. */
async function rewrite(
  paths: readonly string[],
  flags: WriteFlags,
  { stdout, stderr, signal }: Context,
  make: (opened: readonly OpenedLora[], progress: Progress) => readonly LoraLayer[],
): Promise<void> {
  const progress = createProgress(stderr, { quiet: flags.quiet });
  const opened = await openLoras(paths);
  try {
    const [first] = opened as [OpenedLora];
    await requireOther(
      flags.output,
      opened.map(({ source }) => source),
    );
    await makeFolderOf(flags.output);
    await requireWritable(flags.output);
    const { tensors, metadata } = loraFile(make(opened, progress), {
      format: flags.format ?? (layoutOf(first.file).startsWith('diffusers') ? 'diffusers' : 'kohya'),
      // Of several, what is said about one is not true of all.
      metadata: opened.length === 1 ? first.file.metadata : {},
      dtype: flags.dtype ?? widest(opened),
    });
    signal.throwIfAborted();
    await writeFileAtomically(flags.output, safetensorsChunks(tensors, metadata), { signal });
    const unused = opened.reduce((sum, { lora }) => sum + lora.unused.length, 0);
    if (unused > 0 && !flags.quiet) {
      progress.say(`${unused} ${unused === 1 ? 'tensor' : 'tensors'} that change no weight are left out.`);
    }
    stdout.write(`${flags.output}\n`);
  } finally {
    progress.stop();
    await closeAll(opened);
  }
}

/** The number format that loses nothing of what files hold: float16 and bfloat16 together need float32. */
function widest(opened: readonly OpenedLora[]): LoraDType {
  const types = new Set(
    opened.flatMap(({ file }) =>
      [...file.tensors].flatMap(([name, { dtype }]) => (/\.alpha$/.test(name) ? [] : dtype)),
    ),
  );
  if (types.has('float32') || types.has('float64')) return 'float32';
  if (!types.has('bfloat16')) return 'float16';
  return types.has('float16') ? 'float32' : 'bfloat16';
}

function addInfo(program: Command, { stdout }: Context): void {
  program
    .command('info')
    .description('tell what a LoRA file is: layout, parts, rank, alpha, what it changes, metadata')
    .argument('<file>', 'the LoRA')
    .option('--json', 'as JSON')
    .action(async (path: string, { json }: { json?: true }) => {
      const opened = await openLoras([path]);
      try {
        const info = describe(opened[0]!);
        stdout.write(`${json ? JSON.stringify(info, null, 2) : infoLines(info).join('\n')}\n`);
      } finally {
        await closeAll(opened);
      }
    });
}

interface LoraInfo {
  readonly file: string;
  readonly bytes: number;
  readonly layout: string;
  readonly dtypes: readonly string[];
  readonly parts: readonly {
    readonly part: string;
    readonly weights: number;
    /** Each that occurs, ascending. */
    readonly ranks: readonly number[];
    readonly alphas: readonly number[];
    /** Weights with `*` for the number of the block. */
    readonly targets: Readonly<Record<string, readonly number[]>>;
  }[];
  readonly unused: readonly string[];
  readonly metadata: Readonly<Record<string, string>>;
}

function describe({ lora, file, source }: OpenedLora): LoraInfo {
  return {
    file: source.name,
    bytes: source.size,
    layout: layoutOf(file),
    dtypes: [...new Set([...file.tensors.values()].map(({ dtype }) => dtype))].sort(),
    parts: partNames.flatMap((part) => {
      const changes = part === 'vae' ? undefined : lora.parts[part];
      if (!changes) return [];
      const all = [...changes.values()].flat();
      return {
        part,
        weights: changes.size,
        ranks: distinct(all.map(({ down }) => down.shape[0]!)),
        alphas: distinct(all.map(alphaOf)),
        targets: targetsOf([...changes.keys()]),
      };
    }),
    unused: lora.unused,
    metadata: file.metadata,
  };
}

function alphaOf({ scale, down }: LowRank): number {
  return Number((scale * down.shape[0]!).toPrecision(6));
}

/** The layouts of a file's names, those of most names first. */
function layoutOf({ tensors }: SafetensorsFile): string {
  const counts = new Map<string, number>();
  for (const name of tensors.keys()) counts.set(loraLayout(name), (counts.get(loraLayout(name)) ?? 0) + 1);
  return [...counts]
    .sort(([, a], [, b]) => b - a)
    .map(([layout]) => layout)
    .join(' and ');
}

/** Weights by their names with `*` for the number of the block, with those numbers. */
function targetsOf(weights: readonly string[]): Record<string, number[]> {
  const targets: Record<string, number[]> = {};
  for (const weight of weights) {
    const block = /(?:^joint_blocks|\.layers|\.block)\.(\d+)\./.exec(weight)?.[1];
    const name = weight.replace(/\.weight$/, '').replace(`.${block}.`, '.*.');
    targets[name] ??= [];
    if (block !== undefined) targets[name].push(Number(block));
  }
  for (const blocks of Object.values(targets)) blocks.sort((a, b) => a - b);
  return targets;
}

function infoLines({ file, bytes, layout, dtypes, parts, unused, metadata }: LoraInfo): string[] {
  return [
    `${file}: a LoRA in the layout of ${layout}, ${dtypes.join(' and ')}, ${formatBytes(bytes)}`,
    ...parts.flatMap(({ part, weights, ranks, alphas, targets }) => [
      '',
      `${partTitles[part as keyof typeof partTitles]}: ${weights} ${weights === 1 ? 'weight' : 'weights'}, rank ${range(ranks)}, alpha ${range(alphas)}`,
      ...Object.entries(targets).map(([name, blocks]) => `  ${name}${blocks.length ? `  ${runs(blocks)}` : ''}`),
    ]),
    ...(unused.length ? ['', `${unused.length} other tensors, such as ${quote(unused[0]!)}`] : []),
    ...(Object.keys(metadata).length ? ['', 'metadata:'] : []),
    ...Object.entries(metadata).map(([key, value]) => `  ${quote(key)}: ${quote(value)}`),
  ];
}

function distinct(values: readonly number[]): number[] {
  return [...new Set(values)].sort((a, b) => a - b);
}

/** Such as 4, or 4 to 12. */
function range(values: readonly number[]): string {
  const ordered = distinct(values);
  return ordered.length > 1 ? `${ordered[0]} to ${ordered.at(-1)}` : String(ordered[0]);
}

/** Ascending numbers such as 0-3, 7. */
function runs(numbers: readonly number[]): string {
  const found: [number, number][] = [];
  for (const number of numbers) {
    const last = found.at(-1);
    if (last && number === last[1] + 1) last[1] = number;
    else found.push([number, number]);
  }
  return found.map(([first, last]) => (first === last ? String(first) : `${first}-${last}`)).join(', ');
}

interface OpenedLora {
  readonly lora: Lora;
  readonly file: SafetensorsFile;
  readonly source: FileSource;
}

async function openLoras(paths: readonly string[]): Promise<OpenedLora[]> {
  const sources: FileSource[] = [];
  try {
    for (const path of paths) sources.push(await fileSource(path));
    return await Promise.all(
      sources.map(async (source) => ({ lora: await openLora(source), file: await openSafetensors(source), source })),
    );
  } catch (error) {
    await Promise.all(sources.map((source) => source.close()));
    throw error;
  }
}

async function closeAll(opened: readonly OpenedLora[]): Promise<void> {
  await Promise.all(opened.map(({ source }) => source.close()));
}

function withStrengths(opened: readonly OpenedLora[], flags: readonly LoraFlag[]): { lora: Lora; strength: number }[] {
  return opened.map(({ lora }, i) => ({ lora, strength: flags[i]!.strength }));
}

async function requireOther(output: string, inputs: readonly FileSource[]): Promise<void> {
  const replaced = await realpath(output).catch(() => undefined);
  if (!inputs.some(({ path }) => path === replaced)) return;
  throw new MmditxError('bad-option', `${output} is one of the files that are read; choose another output.`);
}
