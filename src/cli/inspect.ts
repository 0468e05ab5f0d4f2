/** `mmditx inspect`: what a checkpoint is, from its header. */
import type { Command } from 'commander';
import { type FileSource, fileSource } from '../weights/files.node.ts';
import { formatInspection, inspectCheckpoint } from '../weights/inspect.ts';
import type { Context } from './context.ts';

export function addInspect(program: Command, { stdout }: Context): void {
  program
    .command('inspect')
    .description('tell what a checkpoint is: parts, configurations, number formats, and what is missing')
    .argument('<file...>', 'a safetensors file, or all files of a model in parts')
    .option('--json', 'as JSON')
    .action(async (paths: string[], { json }: { json?: true }) => {
      const sources: FileSource[] = [];
      try {
        for (const path of paths) sources.push(await fileSource(path));
        const inspection = await inspectCheckpoint(sources);
        stdout.write(`${json ? JSON.stringify(inspection, null, 2) : formatInspection(inspection)}\n`);
      } finally {
        await Promise.all(sources.map((source) => source.close()));
      }
    });
}
