/** `npm run schema`: writes the JSON Schema of training configurations, which editors complete and check them with. */

import { mkdir, writeFile } from 'node:fs/promises';
import { dirname } from 'node:path';
import { fileURLToPath } from 'node:url';
import { trainConfigJsonSchema } from '../src/training/config.ts';

const path = fileURLToPath(new URL('../schema/train.schema.json', import.meta.url));
await mkdir(dirname(path), { recursive: true });
await writeFile(path, `${JSON.stringify(trainConfigJsonSchema(), null, 2)}\n`);
