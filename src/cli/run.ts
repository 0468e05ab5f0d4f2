/** The command line: its commands, and how each way of ending is told. */
import { Command, CommanderError } from 'commander';
import { MmditxError } from '../errors.ts';
import { VERSION } from '../version.ts';
import type { Context } from './context.ts';
import { addConvert } from './convert.ts';
import { addDataset, addEncode } from './dataset.ts';
import { addDownload } from './download.ts';
import { addGenerate } from './generate.ts';
import { addInspect } from './inspect.ts';
import { addLora } from './lora.ts';
import { addProbe } from './probe.ts';
import { addTrain } from './train.ts';

/** Exit codes: the work failed, the command line cannot be understood, Ctrl-C (128 + SIGINT, as shells have it). */
export const EXIT_FAILED = 1;
export const EXIT_USAGE = 2;
export const EXIT_STOPPED = 130;

/**
 * Runs a command.
 * @param argv the arguments after the program's name
 * @returns the exit code; errors have been written to the standard error stream
 */
export async function run(argv: readonly string[], context: Context): Promise<number> {
  const program = createProgram(context);
  try {
    await program.parseAsync(argv, { from: 'user' });
    return 0;
  } catch (error) {
    if (error instanceof CommanderError && error.exitCode === 0) return 0;
    const { exitCode, message } = explain(error, context.signal);
    if (message) context.stderr.write(`mmditx: ${message}\n`);
    const debug = program.opts<{ debug?: true }>().debug || context.environment.DEBUG === 'mmditx';
    if (debug && error instanceof Error) context.stderr.write(`${error.stack}\n${causes(error)}`);
    return exitCode;
  }
}

function createProgram(context: Context): Command {
  const program = new Command('mmditx')
    .description('Stable Diffusion 3.5 Medium: pictures from words, on this machine.')
    .version(VERSION)
    .option('--debug', 'show where an error came from')
    .exitOverride()
    .configureOutput({
      writeOut: (text) => context.stdout.write(text),
      writeErr: (text) => context.stderr.write(text),
      // `explain` words errors.
      outputError: () => undefined,
    })
    .addHelpText(
      'after',
      `
Examples:
  mmditx generate "a red fox in the snow"
  mmditx generate "a red fox" --model sd3.5_medium.safetensors --size 1024x768 --slg
  mmditx inspect sd3.5_medium.safetensors
  mmditx help generate`,
    );
  addGenerate(program, context);
  addDownload(program, context);
  addInspect(program, context);
  addConvert(program, context);
  addTrain(program, context);
  addEncode(program, context);
  addDataset(program, context);
  addLora(program, context);
  addProbe(program, context);
  return program;
}

function explain(error: unknown, signal: AbortSignal): { exitCode: number; message: string } {
  if (signal.aborted && error === signal.reason) return { exitCode: EXIT_STOPPED, message: 'Stopped.' };
  if (error instanceof CommanderError) return { exitCode: EXIT_USAGE, message: usageMessage(error) };
  if (error instanceof MmditxError) return { exitCode: EXIT_FAILED, message: error.message };
  const [reason] = String(error instanceof Error ? error.message : error).split('\n');
  return {
    exitCode: EXIT_FAILED,
    message: `Something unexpected went wrong (${reason}); run it again with --debug and report what it says.`,
  };
}

/** Commander's message as one sentence; empty where help was shown instead. */
function usageMessage({ code, message }: CommanderError): string {
  if (code === 'commander.help') return '';
  const text = message
    .replace(/^error: /, '')
    .replace(/ is invalid\. (.)/, (_, first: string) => ` is invalid: ${first.toLowerCase()}`)
    .replace(/\. Expected/, ': expected')
    .replace(/\s+/g, ' ')
    .replace(/\.$/, '');
  const remedy = code === 'commander.excessArguments' ? '; put a prompt of several words into quotes' : '';
  return `${text[0]?.toUpperCase()}${text.slice(1)}${remedy}; see mmditx --help.`;
}

function causes({ cause }: Error): string {
  return cause instanceof Error ? `Caused by ${cause.stack}\n${causes(cause)}` : '';
}
