from django.db import migrations, models
from django.db.models.fields.json import KT
from django.db.models.functions import Cast


def named(what, field):
    resumed = models.When(resume_from__isnull=False, then=Cast(KT(f"resume_from__{what}"), field))
    return models.Case(resumed, default=Cast(KT(f"spec__start__{what}"), field))


class Migration(migrations.Migration):

    dependencies = [
        ('experiments', '0008_last_words'),
    ]

    operations = [
        migrations.AddField(
            model_name='run',
            name='begins_with',
            field=models.GeneratedField(expression=named('run', models.BigIntegerField()), output_field=models.BigIntegerField(null=True), db_persist=True),
        ),
        migrations.AddField(
            model_name='run',
            name='begins_at',
            field=models.GeneratedField(expression=named('step', models.IntegerField()), output_field=models.IntegerField(null=True), db_persist=True),
        ),
        migrations.AddIndex(
            model_name='run',
            index=models.Index(
                condition=models.Q(state='queued') & (models.Q(progress_checkpoint_step__gt=0) | models.Q(begins_with__isnull=False)),
                fields=['-priority', 'created_at', 'id'],
                name='run_queue_origin',
            ),
        ),
    ]
