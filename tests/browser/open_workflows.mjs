// Open workflow files in the real ComfyUI frontend by drag and drop and report what it made of them.
// usage: node open_workflows.mjs SERVER_URL SCREENSHOT_FOLDER WORKFLOW.json...
// Prints one JSON object: file name -> { nodes, links, missing, flagged, dialogs, errors }.
import fs from 'node:fs'
import path from 'node:path'
import { newPage, openFrontend, startBrowser } from './frontend.mjs'

const [url, screenshots, ...files] = process.argv.slice(2)

const browser = await startBrowser()
const page = await newPage(browser)
let errors = []
page.on('pageerror', (error) => errors.push(error.message))

async function drop(text, name) {
  const transfer = await page.evaluateHandle(
    ([content, fileName]) => {
      const data = new DataTransfer()
      data.items.add(new File([content], fileName, { type: 'application/json' }))
      return data
    },
    [text, name]
  )
  const canvas = await page.$('#graph-canvas')
  for (const event of ['dragenter', 'dragover', 'drop']) {
    await canvas.dispatchEvent(event, { dataTransfer: transfer })
  }
}

async function state() {
  return page.evaluate(() => {
    const registered = LiteGraph.registered_node_types
    const nodes = app.graph.nodes
    return {
      nodes: nodes.length,
      links: nodes.flatMap((node) => node.inputs ?? []).filter((input) => input.link != null).length,
      missing: nodes.filter((node) => !(node.type in registered)).map((node) => node.type),
      flagged: nodes.filter((node) => node.has_errors).map((node) => node.type),
      dialogs: [...document.querySelectorAll('[role=dialog]')].map((d) => d.innerText)
    }
  })
}

const report = {}
for (const file of files) {
  const text = fs.readFileSync(file, 'utf8')
  // A page of its own for each file: dialogs of one must not be counted for the next.
  await openFrontend(page, url)
  errors = []
  await drop(text, path.basename(file))
  const expected = JSON.parse(text).nodes.length
  await page
    .waitForFunction((count) => app.graph.nodes.length === count, expected, { timeout: 20000 })
    .catch((error) => errors.push(error.message))
  // Warnings about missing nodes and models appear shortly after the graph.
  await page.waitForTimeout(2500)
  const name = path.basename(file, '.json')
  report[name] = { ...(await state()), errors }
  await page.screenshot({ path: path.join(screenshots, `${name}.png`) })
}
await browser.close()
console.log(JSON.stringify(report))
