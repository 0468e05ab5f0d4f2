/** `mmditx convert`: a model in another precision, as one file that is mapped into memory as it is. */

import { realpath } from 'node:fs/promises';
import { type Command, Option } from 'commander';
import { MmditxError } from '../errors.ts';
import { openFiles } from '../index.node.ts';
import { writeFileAtomically } from '../weights/atomic.node.ts';
import { partNames, partTitles } from '../weights/checkpoint.ts';
import { convertedMetadata, type Precision, partPrefixes, plannedTensors } from '../weights/convert.ts';
import { CLIP_TOKENIZER_KEY, T5_TOKENIZER_KEY } from '../weights/metadata.ts';
import { plannedSafetensorsBytes, plannedSafetensorsChunks } from '../weights/safetensors.ts';
import type { Context } from './context.ts';
import { createProgress } from './progress.ts';
import { makeFolderOf, requireRoom, requireWritable } from './writable.ts';

interface ConvertFlags {
  readonly precision: Precision;
  readonly output: string;
  readonly quiet?: true;
}

export function addConvert(program: Command, context: Context): void {
  program
    .command('convert')
    .description('write a model in another precision, all parts in one file')
    .argument('<file...>', 'the model: a file, all its files, or a folder')
    .requiredOption('-o, --output <file>', 'safetensors file to write')
    .addOption(
      new Option('--precision <name>', 'fp16 (as stored; blocks of GGUF become 16 bits), int8 or int4')
        .choices(['fp16', 'int8', 'int4'])
        .default('int8'),
    )
    .option('-q, --quiet', 'no progress')
    .addHelpText(
      'after',
      `
generate does this by itself where it needs to, into your cache folder.

Example:
  mmditx convert sd3.5_medium.safetensors clip_l.safetensors clip_g.safetensors t5xxl_fp16.safetensors -o sd3.5-int8.safetensors`,
    )
    .action(async (paths: string[], flags: ConvertFlags) => {
      const progress = createProgress(context.stderr, { quiet: flags.quiet });
      const { checkpoint, sources, close } = await openFiles(paths, flags.quiet ? {} : { onNote: progress.say });
      try {
        const { parts, tokenizers } = checkpoint;
        const plans = partNames.flatMap((part) => {
          const weights = parts[part];
          return weights ? plannedTensors(part, weights, flags.precision, partPrefixes[part]) : [];
        });
        const metadata = {
          ...convertedMetadata(parts),
          ...(tokenizers.clip !== undefined && { [CLIP_TOKENIZER_KEY]: tokenizers.clip }),
          ...(tokenizers.t5 !== undefined && { [T5_TOKENIZER_KEY]: tokenizers.t5 }),
        };
        const bytes = plannedSafetensorsBytes(plans, metadata);
        const replaced = await realpath(flags.output).catch(() => undefined);
        if (sources.some(({ path }) => path === replaced)) {
          throw new MmditxError('bad-option', `${flags.output} is a file of the model; choose another output.`);
        }
        await makeFolderOf(flags.output);
        await requireWritable(flags.output);
        await requireRoom(flags.output, bytes);
        let written = 0;
        const reported = async function* () {
          for await (const chunk of plannedSafetensorsChunks(plans, metadata)) {
            yield chunk;
            written += chunk.length;
            progress.convert(`Converting to ${flags.precision}`, written, bytes);
          }
        };
        await writeFileAtomically(flags.output, reported(), { signal: context.signal });
        const missing = partNames.filter((part) => !parts[part]).map((part) => partTitles[part]);
        if (missing.length > 0 && !flags.quiet) progress.say(`Not in it: ${missing.join(', ')}.`);
        context.stdout.write(`${flags.output}\n`);
      } finally {
        progress.stop();
        await close();
      }
    });
}
