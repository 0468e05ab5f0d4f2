/** `mmditx dataset` and `mmditx encode`: looking at the data sets of a training configuration, and encoding them ahead. */

import { spawn } from 'node:child_process';
import type { Command } from 'commander';
import { MmditxError } from '../errors.ts';
import { describeData, encodeData } from '../training/train.node.ts';
import type { Context } from './context.ts';
import { preparationLines } from './train.ts';
import { wholeNumber } from './values.ts';

export function addDataset(program: Command, context: Context): void {
  program
    .command('dataset')
    .description('show what the data sets of a training configuration hold: sizes, captions, what is cut or broken')
    .argument('<config>', 'YAML or JSON, as for train')
    .action(async (config: string) => {
      context.stdout.write(`${await describeData(config, { signal: context.signal })}\n`);
    });
}

interface EncodeFlags {
  readonly workers: number;
  readonly quiet?: true;
}

/** Processes that one command may start. */
const MAX_WORKERS = 64;

export function addEncode(program: Command, context: Context): void {
  program
    .command('encode')
    .description('encode the pictures and texts of a training configuration ahead')
    .argument('<config>', 'YAML or JSON, as for train')
    .option('--workers <count>', `processes that share the work, at most ${MAX_WORKERS}`, wholeNumber, 1)
    .option('-q, --quiet', 'no progress')
    .addHelpText(
      'after',
      `
Run it as often as you like, on as many machines as share the cache folder: nothing is encoded twice, and what a killed
process had begun is taken over by another. train does the same by itself before it begins.`,
    )
    .action(async (config: string, flags: EncodeFlags) => {
      if (flags.workers < 1 || flags.workers > MAX_WORKERS) {
        throw new MmditxError('bad-option', `There cannot be ${flags.workers} workers; give 1 to ${MAX_WORKERS}.`);
      }
      const others = Array.from({ length: flags.workers - 1 }, () => startWorker(config, context.signal));
      const complete = await encodeData(config, {
        signal: context.signal,
        onEvent: (event) => event.type === 'note' && context.stderr.write(`${event.message}\n`),
        ...(!flags.quiet && { onPreparation: preparationLines((line) => context.stderr.write(`${line}\n`)) }),
      });
      await Promise.all(others);
      context.stdout.write(
        complete
          ? 'Everything is encoded.\n'
          : 'Encoded as far as the stages that are finished allow; the others follow when mmditx train has made their networks.\n',
      );
    });
}

/** The same command in another process. */
function startWorker(config: string, signal: AbortSignal): Promise<void> {
  const [script] = process.argv.slice(1);
  const child = spawn(process.execPath, [...process.execArgv, script!, 'encode', config, '--quiet'], {
    stdio: ['ignore', 'ignore', 'inherit'],
    signal,
  });
  return new Promise((resolve, reject) => {
    child.on('error', reject);
    child.on('exit', (code) => {
      if (code === 0) resolve();
      else reject(new MmditxError('io', 'A worker ended early; run the command again to go on from where it stopped.'));
    });
  });
}
