/** Reading a training configuration: YAML, of which JSON is a part. */

import { readFile } from 'node:fs/promises';
import { basename, dirname, isAbsolute, join, resolve } from 'node:path';
import { parseDocument } from 'yaml';
import { MmditxError } from '../errors.ts';
import { ioError } from '../weights/atomic.node.ts';
import { checkTrainConfig, type TrainConfig } from './config.ts';

/** Configurations are short; nobody writes this much by hand. */
const MAX_BYTES = 2 ** 20;

export interface TrainConfigFile {
  readonly config: TrainConfig;
  /** A path in the configuration, which is relative to its folder. */
  resolve(path: string): string;
  /** Folder of the run. */
  readonly output: string;
}

/**
 * Reads and validates a configuration. YAML's anchors and merge keys (`<<`) work, so that stages can share settings.
 * @throws MmditxError `io`; `bad-option` with the line of a mistake in the syntax, or the place of each in the values
 */
export async function readTrainConfig(path: string): Promise<TrainConfigFile> {
  const text = await readFile(path, 'utf8').catch((cause) => {
    throw ioError('read', path, cause);
  });
  const name = basename(path);
  if (text.length > MAX_BYTES) {
    throw new MmditxError(
      'bad-option',
      `${path} is too large for a training configuration; give the path of a YAML or JSON file.`,
    );
  }
  const document = parseDocument(text, { merge: true, prettyErrors: true });
  const [mistake] = document.errors;
  if (mistake) {
    const [line = mistake.message] = mistake.message.split('\n');
    throw new MmditxError('bad-option', `${name} cannot be read: ${line.replace(/[:.]?$/, '')}.`);
  }
  const value = aliasesResolved(document, name);
  const config = checkTrainConfig(value, name);
  const folder = dirname(resolve(path));
  const within = (file: string) => (isAbsolute(file) ? file : join(folder, file));
  return { config, resolve: within, output: within(config.output ?? join('runs', config.name)) };
}

/** Aliases of aliases can grow without bound ("billion laughs"): the parser counts them. Entries that begin with a dot only hold anchors. */
function aliasesResolved(document: ReturnType<typeof parseDocument>, name: string): unknown {
  try {
    const value: unknown = document.toJS({ maxAliasCount: 1000 });
    if (typeof value !== 'object' || value === null || Array.isArray(value)) return value;
    return Object.fromEntries(Object.entries(value).filter(([key]) => !key.startsWith('.')));
  } catch (cause) {
    throw new MmditxError(
      'bad-option',
      `${name} cannot be read: ${cause instanceof Error ? cause.message : String(cause)}.`,
      {
        cause,
      },
    );
  }
}
