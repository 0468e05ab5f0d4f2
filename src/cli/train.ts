/** `mmditx train`: pretraining, fine-tuning, LoRA, the autoencoder and tokenizers, as a configuration file says. */

import type { Command } from 'commander';
import { type TrainOptions, train } from '../training/train.node.ts';
import type { Context } from './context.ts';
import { createTrainProgress } from './train-progress.ts';

interface TrainFlags {
  readonly quiet?: true;
}

export function addTrain(program: Command, context: Context): void {
  program
    .command('train')
    .description('train as a configuration file says; run again to go on from where it stopped')
    .argument('<config>', 'YAML or JSON (schema/train.schema.json describes it)')
    .option('-q, --quiet', 'no progress')
    .addHelpText(
      'after',
      `
The folder of the run holds report.html, which renews itself while the run goes on, log.jsonl with every step, saved
states and sample pictures. Ctrl-C saves the state; a run that was killed goes on from the last saved state.

Example:
  mmditx train lora.yaml`,
    )
    .action(async (config: string, flags: TrainFlags) => {
      const progress = createTrainProgress(context.stderr, { quiet: flags.quiet === true });
      try {
        const { files, folder } = await train(config, {
          signal: context.signal,
          onEvent: (event) => progress.event(event),
          ...(!flags.quiet && { onData: (text: string) => progress.say(`${text}\n`) }),
          ...(!flags.quiet && { onPreparation: preparationLines(progress.say) }),
        });
        for (const file of files) context.stdout.write(`${file}\n`);
        if (!flags.quiet) progress.say(`Report: ${folder}/report.html`);
      } finally {
        progress.stop();
      }
    });
}

/** Tells of long preparations with a line at each tenth. */
export function preparationLines(say: (line: string) => void): NonNullable<TrainOptions['onPreparation']> {
  const shown = new Map<string, number>();
  return ({ what, done, total }) => {
    const tenth = Math.floor((10 * done) / total);
    if (total < LONG || shown.get(what) === tenth) return;
    shown.set(what, tenth);
    say(`${what}: ${done} of ${total}`);
  };
}
/** Pieces from which on a preparation is told about. */
const LONG = 200;
