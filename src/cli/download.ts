/** `mmditx download`: models from the Hugging Face hub. */
import { createInterface } from 'node:readline/promises';
import type { Readable } from 'node:stream';
import { Presets, SingleBar } from 'cli-progress';
import { type Command, Option } from 'commander';
import { MmditxError } from '../errors.ts';
import {
  DEFAULT_REPO,
  type DownloadedFile,
  type DownloadPlan,
  type DownloadProgress,
  downloadModel,
  formatBytes,
  T5_FORMATS,
  type T5Format,
} from '../weights/download.node.ts';
import type { Context, Output } from './context.ts';
import { formatSeconds } from './progress.ts';
import { defined, repeated } from './values.ts';

interface DownloadFlags {
  readonly t5?: T5Format;
  readonly include?: readonly string[];
  readonly revision?: string;
  readonly token?: string;
  readonly endpoint?: string;
  readonly cache?: string;
  readonly offline?: true;
  readonly yes?: true;
  readonly quiet?: true;
}

/** Where answers are typed. */
export type Input = Readable & { readonly isTTY?: boolean };

export function addDownload(program: Command, context: Context, input: Input = process.stdin): void {
  program
    .command('download')
    .description('fetch a model from the Hugging Face hub into the cache that its tools share; the folder is printed')
    .argument('[repo]', 'name of the model on the hub', DEFAULT_REPO)
    .addOption(
      new Option('--t5 <format>', 'the T5 text encoder (default: fp16, 9.8 GB; fp8 has half)')
        .choices(T5_FORMATS)
        .conflicts('include'),
    )
    .option('--include <pattern>', 'other files, such as "vae/*" or "**/*.json"; may be repeated', repeated)
    .option('--revision <name>', 'branch, tag or commit (default: main)')
    .optionsGroup('Hub:')
    .option('--token <token>', 'access token (default: HF_TOKEN, or the one hf auth login has stored)')
    .option('--endpoint <address>', 'the hub (default: HF_ENDPOINT, or https://huggingface.co)')
    .option('--cache <folder>', 'the cache (default: HF_HUB_CACHE, HF_HOME/hub, or ~/.cache/huggingface/hub)')
    .option('--offline', 'take what the cache has and say what it lacks (default: HF_HUB_OFFLINE)')
    .option('-y, --yes', 'accept the licence without being asked')
    .option('-q, --quiet', 'no progress')
    .addHelpText(
      'after',
      `
What has been fetched stays when a download is stopped; the same command goes on from there.

Examples:
  mmditx download
  mmditx download --t5 fp8 --yes
  mmditx download stabilityai/stable-diffusion-3.5-medium --include "vae/*" --include LICENSE.md`,
    )
    .action((repo: string, flags: DownloadFlags) => download(repo, flags, context, input));
}

async function download(repo: string, flags: DownloadFlags, context: Context, input: Input): Promise<void> {
  const { t5, include, revision, token, endpoint, cache, offline } = flags;
  const { stdout, stderr, environment, signal } = context;
  const progress = createTransferProgress(stderr, flags.quiet === true);
  try {
    const { folder, files } = await downloadModel({
      ...defined({ t5, include, revision, token, endpoint, cache, offline }),
      repo,
      environment,
      signal,
      onProgress: progress.update,
      onNote: progress.say,
      confirm: (plan) => confirm(plan, flags.yes === true, context, input),
    });
    progress.stop();
    stdout.write(`${folder}\n`);
    const next = nextCommand(files, include !== undefined);
    if (next && !flags.quiet) stderr.write(`${next}\n`);
  } finally {
    progress.stop();
  }
}

/** @throws MmditxError `bad-option` when the licence is not accepted */
async function confirm(plan: DownloadPlan, yes: boolean, { stderr, signal }: Context, input: Input): Promise<void> {
  const { licence, files, bytes, cache } = plan;
  stderr.write(`${licence.summary}\n`);
  if (bytes === 0) return;
  const count = files.filter(({ cached }) => !cached).length;
  stderr.write(`To fetch: ${count} of ${files.length} files, ${formatBytes(bytes)}, into ${cache}\n`);
  if (yes) return;
  if (!input.isTTY || !stderr.isTTY) {
    throw new MmditxError('bad-option', 'Nothing was fetched: read the licence, and accept it with --yes.');
  }
  const answer = await ask('Do you accept the licence and want to fetch the files? [y/N] ', stderr, input, signal);
  if (!/^y(es)?$/i.test(answer.trim())) {
    throw new MmditxError('bad-option', 'Nothing was fetched, because the licence was not accepted.');
  }
}

/** A line that is typed; empty where the input ends. */
async function ask(question: string, output: Output, input: Input, signal: AbortSignal): Promise<string> {
  // Not as a terminal: Ctrl-C is the process's, not this line's.
  const lines = createInterface({ input, output, terminal: false });
  try {
    const end = new Promise<string>((resolve) => lines.once('close', () => resolve('')));
    return await Promise.race([lines.question(question, { signal }), end]);
  } catch (error) {
    signal.throwIfAborted();
    throw error;
  } finally {
    lines.close();
  }
}

/** The command that uses the files; for files that were chosen, the one that tells what they are. */
function nextCommand(files: readonly DownloadedFile[], chosen: boolean): string | undefined {
  const models = files.filter(({ name }) => name.endsWith('.safetensors')).map(({ path }) => shellWord(path));
  if (models.length === 0) return undefined;
  if (chosen) return `See what they are with:\n  mmditx inspect ${models.join(' ')}`;
  return `Draw with it:\n  mmditx generate "a red fox in the snow" ${models.map((path) => `--model ${path}`).join(' ')}`;
}

/** A path as it is typed. */
function shellWord(path: string): string {
  if (/^[\w@%+=:,./\\~-]+$/.test(path)) return path;
  return process.platform === 'win32' ? `"${path}"` : `'${path.replaceAll("'", `'\\''`)}'`;
}

interface TransferProgress {
  update(progress: DownloadProgress): void;
  /** A line of text, which does not disturb the bar. */
  say(text: string): void;
  /** Takes the bar away. */
  stop(): void;
}

/** Milliseconds between two lines where there is no terminal. */
const LINE_INTERVAL = 10_000;
const BAR_WIDTH = 30;

/** Bytes, their rate and the time left: a bar on a terminal, now and then a line elsewhere. */
export function createTransferProgress(
  output: Output,
  quiet: boolean,
  now: () => number = () => performance.now(),
): TransferProgress {
  const say = (text: string) => void output.write(`${text}\n`);
  if (quiet) return { say, update: () => undefined, stop: () => undefined };
  const rateOf = transferRate(now);
  const describe = ({ done, total, fetched }: DownloadProgress) => {
    const rate = rateOf(fetched);
    const pace = rate > 0 ? `${formatBytes(Math.round(rate))}/s, ${formatSeconds((total - done) / rate)} left` : '';
    return { amount: `${formatBytes(done)} of ${formatBytes(total)}`, pace };
  };
  if (!output.isTTY) {
    let lastLine = now();
    return {
      say,
      update(progress) {
        const { amount, pace } = describe(progress);
        if (now() - lastLine < LINE_INTERVAL || progress.done === progress.total) return;
        lastLine = now();
        say([amount, pace].filter(Boolean).join(', '));
      },
      stop: () => undefined,
    };
  }

  const settings = { format: '{bar} {amount}  {pace}', stream: output, barsize: BAR_WIDTH };
  const bar = new SingleBar(
    { ...settings, clearOnComplete: true, linewrap: true, gracefulExit: false, emptyOnZero: true },
    Presets.shades_classic,
  );
  const stop = () => {
    if (bar.isActive) bar.stop();
  };
  return {
    say(text) {
      stop();
      say(text);
    },
    update(progress) {
      const { done, total } = progress;
      if (bar.isActive) bar.update(done, describe(progress));
      else bar.start(total, done, describe(progress));
    },
    stop,
  };
}

/** Milliseconds that the rate is an average over. */
const RATE_WINDOW = 10_000;
const RATE_INTERVAL = 500;

/** Bytes in a second over the last seconds, from all bytes so far; 0 while nothing can be told. */
function transferRate(now: () => number): (bytes: number) => number {
  const samples: { time: number; bytes: number }[] = [];
  return (bytes) => {
    const time = now();
    if (time - (samples.at(-1)?.time ?? Number.NEGATIVE_INFINITY) >= RATE_INTERVAL) samples.push({ time, bytes });
    while (samples.length > 2 && time - samples[1]!.time >= RATE_WINDOW) samples.shift();
    const first = samples[0]!;
    return time - first.time >= RATE_INTERVAL ? ((bytes - first.bytes) / (time - first.time)) * 1000 : 0;
  };
}
