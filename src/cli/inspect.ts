/** `mmditx inspect`: what a checkpoint is, from its header. */
import type { Command } from 'commander';
import { type FileSource, fileSource } from '../weights/files.node.ts';
import { modelFiles } from '../weights/folder.node.ts';
import { formatInspection, inspectCheckpoint } from '../weights/inspect.ts';
import type { Context } from './context.ts';

export function addInspect(program: Command, { stdout, stderr }: Context): void {
  program
    .command('inspect')
    .description('tell what a checkpoint is: parts, configurations, number formats, and what is missing')
    .argument('<file...>', 'a safetensors or GGUF file, all files of a model in parts, or its folder')
    .option('--json', 'as JSON')
    .action(async (paths: string[], { json }: { json?: true }) => {
      const sources: FileSource[] = [];
      try {
        const onNote = (text: string) => void stderr.write(`${text}\n`);
        for (const path of paths) {
          for (const file of await modelFiles(path, { onNote })) sources.push(await fileSource(file));
        }
        const inspection = await inspectCheckpoint(sources);
        stdout.write(`${json ? JSON.stringify(inspection, null, 2) : formatInspection(inspection)}\n`);
      } finally {
        await Promise.all(sources.map((source) => source.close()));
      }
    });
}
