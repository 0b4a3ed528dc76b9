from django.db import migrations, models

HOSTS = """
UPDATE experiments_checkpoint c SET host = w.host
FROM experiments_run r JOIN experiments_worker w ON w.id = r.worker_id WHERE r.id = c.run_id
"""


class Migration(migrations.Migration):

    dependencies = [
        ('experiments', '0006_hosts'),
    ]

    operations = [
        migrations.AddField(
            model_name='worker',
            name='storage',
            field=models.CharField(blank=True, default='', max_length=500),
        ),
        migrations.AddField(
            model_name='checkpoint',
            name='host',
            field=models.CharField(blank=True, default='', max_length=200),
        ),
        migrations.AddField(
            model_name='checkpoint',
            name='storage',
            field=models.CharField(blank=True, default='', max_length=500),
        ),
        migrations.AddField(
            model_name='checkpoint',
            name='storage_problem',
            field=models.CharField(blank=True, default='', max_length=500),
        ),
        migrations.RunSQL(HOSTS, migrations.RunSQL.noop),
    ]
